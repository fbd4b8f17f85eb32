//! What one route takes and answers.

use crate::wire::errors::{Failure, ValidationError};
use crate::wire::text::{FileParts, Octets};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use std::collections::BTreeMap;

/// A type's schema.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// What operations are sorted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    Sandbox,
    Snapshot,
    Process,
    Filesystem,
    Git,
    Pty,
    PresignedUrl,
    Host,
}

impl Tag {
    pub(super) const ALL: [(Self, &'static str); 8] = [
        (Self::Sandbox, "Make, show, pause, wake, stop, start and delete sandboxes."),
        (Self::Snapshot, "Named snapshots of sandboxes, and sandboxes made from them."),
        (Self::Process, "Run commands in a sandbox. A paused one is woken first."),
        (Self::Filesystem, "Files of a sandbox. A paused one is woken first."),
        (
            Self::Git,
            "git in a sandbox. A paused one is woken first. A git that fails is an answer, with its exit status.",
        ),
        (Self::Pty, "Terminals of a sandbox; they live through pause and wake."),
        (Self::PresignedUrl, "URLs by which a port of a sandbox is reached without a key, for a while."),
        (Self::Host, "This supervisor: health, metrics, its description."),
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sandbox => "Sandbox",
            Self::Snapshot => "Snapshot",
            Self::Process => "Process",
            Self::Filesystem => "Filesystem",
            Self::Git => "Git",
            Self::Pty => "PTY",
            Self::PresignedUrl => "Presigned URL",
            Self::Host => "Host",
        }
    }
}

/// A body of a request or an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    pub(super) media_type: &'static str,
    pub(super) schema: SchemaOf,
}

impl Content {
    fn json<T: JsonSchema>() -> Self {
        Self { media_type: JSON, schema: schema_of::<T> }
    }
}

const JSON: &str = "application/json";
const OCTETS: &str = "application/octet-stream";
const FORM: &str = "multipart/form-data";

/// One answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) says: &'static str,
    pub(super) content: Option<Content>,
    pub(super) headers: &'static [&'static str],
}

/// What a route takes and answers. Begins with what every route that wants a key can answer.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(super) id: String,
    pub(super) tag: Tag,
    pub(super) summary: &'static str,
    pub(super) says: &'static str,
    pub(super) open: bool,
    pub(super) query: Option<SchemaOf>,
    pub(super) body: Option<Content>,
    pub(super) answers: BTreeMap<u16, Answer>,
}

impl Operation {
    pub(crate) fn new(id: impl Into<String>, tag: Tag, summary: &'static str) -> Self {
        let new = Self {
            id: id.into(),
            tag,
            summary,
            says: "",
            open: false,
            query: None,
            body: None,
            answers: BTreeMap::new(),
        };
        new.fails(401, "No API key, or one that is not accepted.")
            .fails(429, "Too many requests, or too many sandboxes. `Retry-After` says when to try again.")
            .fails(500, "A fault of this server.")
    }

    /// More than the summary says.
    pub(crate) fn says(mut self, says: &'static str) -> Self {
        self.says = says;
        self
    }

    /// Needs no key, and is never refused for want of one or for its rate.
    pub(crate) fn open(mut self) -> Self {
        self.open = true;
        self.answers.clear();
        self
    }

    /// The fields of `T` as its query.
    pub(crate) fn query<T: JsonSchema>(mut self) -> Self {
        self.query = Some(schema_of::<T>);
        self.refuses_fields()
    }

    /// A JSON object. An empty body counts as one without fields.
    pub(crate) fn body<T: JsonSchema>(mut self) -> Self {
        self.body = Some(Content::json::<T>());
        self.refuses_fields().fails(413, "The body is larger than allowed.")
    }

    /// Octets, of any number.
    pub(crate) fn octets(mut self) -> Self {
        self.body = Some(Content { media_type: OCTETS, schema: schema_of::<Octets> });
        self.refuses_fields()
    }

    /// A form with a part for each file.
    pub(crate) fn form(mut self) -> Self {
        self.body = Some(Content { media_type: FORM, schema: schema_of::<FileParts> });
        self.refuses_fields()
    }

    fn refuses_fields(self) -> Self {
        let content = Some(Content::json::<ValidationError>());
        let says = "The request is not valid: every field that is wrong is named.";
        self.answer(400, Answer { says, content, headers: &["stasis-error"] })
    }

    /// A success with a body.
    pub(crate) fn answers<T: JsonSchema>(self, status: u16, says: &'static str) -> Self {
        self.answer(status, Answer { says, content: Some(Content::json::<T>()), headers: &[] })
    }

    /// A success with a body of another type than JSON.
    pub(crate) fn answers_text(self, says: &'static str, media_type: &'static str) -> Self {
        self.answer(
            200,
            Answer { says, content: Some(Content { media_type, schema: schema_of::<String> }), headers: &[] },
        )
    }

    /// A success with a file.
    pub(crate) fn answers_octets(self, says: &'static str) -> Self {
        self.answer(
            200,
            Answer { says, content: Some(Content { media_type: OCTETS, schema: schema_of::<Octets> }), headers: &[] },
        )
    }

    /// A success with a part for each file.
    pub(crate) fn answers_form(self, says: &'static str) -> Self {
        self.answer(
            200,
            Answer { says, content: Some(Content { media_type: FORM, schema: schema_of::<FileParts> }), headers: &[] },
        )
    }

    /// A success without a body.
    pub(crate) fn done(self, status: u16, says: &'static str) -> Self {
        self.answer(status, Answer { says, content: None, headers: &[] })
    }

    /// A failure with a message.
    pub(crate) fn fails(self, status: u16, says: &'static str) -> Self {
        let headers: &[&str] = match status {
            409 | 429 | 503 => &["stasis-error", "retry-after"],
            _ => &["stasis-error"],
        };
        self.answer(status, Answer { says, content: Some(Content::json::<Failure>()), headers })
    }

    /// A failure with a body of its own.
    pub(crate) fn fails_with<T: JsonSchema>(self, status: u16, says: &'static str) -> Self {
        self.answer(status, Answer { says, content: Some(Content::json::<T>()), headers: &[] })
    }

    /// Reads or writes the store.
    pub(crate) fn stores(self) -> Self {
        self.fails(502, "The store refuses, or an object in it is damaged; nothing was lost.")
            .fails(503, "The store cannot be reached, or this host has no room; try again.")
            .fails(504, "It took too long, or the store did not say what became of it: ask for the sandbox's state.")
            .fails(507, "The store is full.")
    }

    /// Changes a sandbox, which its state may forbid.
    pub(crate) fn changes(self, conflict: &'static str) -> Self {
        self.fails(409, conflict).stores()
    }

    /// Is of one sandbox.
    pub(crate) fn of_sandbox(self) -> Self {
        self.fails(404, "There is no such sandbox.")
    }

    /// Asks the guest, after a wake if it sleeps. The guest refuses some requests itself.
    pub(crate) fn asks_guest(self) -> Self {
        self.fails(404, "There is no such sandbox, or what was asked for is not in the guest.")
            .changes("The state forbids it, the template has no agent, or something is in the way in the guest.")
            .fails(403, "The guest's permissions forbid it.")
            .fails(413, "The body, or what the guest would answer, is larger than allowed.")
            .fails(507, "The store, or the guest's disk, is full.")
            .refuses_fields()
            .timed()
    }

    /// Its success says in `Server-Timing` what it cost.
    pub(crate) fn timed(mut self) -> Self {
        for (_, answer) in self.answers.iter_mut().filter(|(status, _)| **status < 400) {
            answer.headers = &["server-timing"];
        }
        self
    }

    fn answer(mut self, status: u16, answer: Answer) -> Self {
        self.answers.insert(status, answer);
        self
    }
}
