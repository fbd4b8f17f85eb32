//! All operations as one document.

use super::operation::{Answer, Content, Operation, SchemaOf, Tag};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use serde_json::{Map, Value, json};

const ABOUT: &str = "Untrusted code in microVM sandboxes that sleep in an object store and wake anywhere.

Every path is also served with a slash at its end. A field of a request that may be absent may be null, too; fields that are not known are \
ignored; an empty body counts as `{}`. Every failure has a JSON body with a `message`, and a stable word for programs in its `stasis-error` \
header. A method that a path does not take is 405 with `Allow`, an unknown path 404.

A sandbox that belongs to another organisation is answered as one that does not exist.

Parts of the contract that this server leaves out are answered 501: `x-left-out` lists them.

Apps in sandboxes are reached by host name, not by paths of this document: `https://<id>-<port>.<domain>/`.";

/// Parameters in paths, by their names: what they are, and how they look.
const IN_PATHS: [(&str, &str, &str); 5] = [
    ("id", "A sandbox.", "^sbx-[a-z0-9]*[a-z][a-z0-9]*$"),
    ("snapshot", "A snapshot, by its id.", "^[^/]+$"),
    ("url", "A presigned URL, by its id.", "^[^/]+$"),
    ("session", "A terminal.", "^[^/]+$"),
    ("template", "A template, by its id.", "^[^/]+$"),
];

/// The document. `operations` are paths with `{…}` where parameters are, methods in lower case, and what they do; `left_out` are those parts of
/// the contract that are answered 501, as method and path.
pub(crate) fn document<'a>(
    operations: impl IntoIterator<Item = (&'a str, String, &'a Operation)>,
    left_out: &[(String, String)],
) -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for (path, method, operation) in operations {
        let described = describe(operation, path, &mut schemas);
        if let Some(methods) = paths.entry(path).or_insert_with(|| json!({})).as_object_mut() {
            methods.insert(method, described);
        }
    }
    let left_out: Vec<Value> =
        left_out.iter().map(|(method, path)| json!({ "method": method, "path": path })).collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Stasis",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "tags": Tag::ALL.map(|(tag, says)| json!({ "name": tag.name(), "description": says })),
        "security": [{ "bearer": [] }, { "leap0": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, made with `stasis key create`. `Bearer` may be left out.",
                },
                "leap0": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "leap0-authorization",
                    "description": "The same where `authorization` belongs to somebody else, such as an app in a sandbox. It goes before the other.",
                },
            },
            "headers": {
                "stasis-error": {
                    "description": "What kind of failure it is, a word for programs that does not change.",
                    "required": true,
                    "schema": { "type": "string", "pattern": "^[a-z-]+$" },
                },
                "retry-after": {
                    "description": "When to try again, seconds.",
                    "schema": { "type": "integer", "minimum": 0 },
                },
                "server-timing": {
                    "description": "What it cost, by phase (https://www.w3.org/TR/server-timing/).",
                    "schema": { "type": "string" },
                },
            },
            "schemas": schemas.components(),
        },
        "x-left-out": left_out,
    })
}

fn describe(operation: &Operation, path: &str, schemas: &mut Schemas) -> Value {
    let mut parameters: Vec<Value> = placeholders(path).map(in_path).collect();
    if let Some(query) = operation.query {
        parameters.extend(in_query(&of_query(query)));
    }
    let answers: Map<String, Value> =
        operation.answers.iter().map(|(status, answer)| (status.to_string(), answer_of(answer, schemas))).collect();
    let mut out = json!({
        "operationId": operation.id,
        "tags": [operation.tag.name()],
        "summary": operation.summary,
        "responses": answers,
    });
    let mut add = |name: &str, value: Value| {
        if let Some(fields) = out.as_object_mut() {
            fields.insert(name.to_owned(), value);
        }
    };
    if !operation.says.is_empty() {
        add("description", json!(operation.says));
    }
    if !parameters.is_empty() {
        add("parameters", json!(parameters));
    }
    if let Some(body) = &operation.body {
        let schema = schemas.of_request(body.schema);
        let required = body.media_type != "application/json" || schemas.has_required(&schema);
        add("requestBody", json!({ "required": required, "content": { body.media_type: { "schema": schema } } }));
    }
    if operation.open {
        add("security", json!([]));
    }
    out
}

fn answer_of(answer: &Answer, schemas: &mut Schemas) -> Value {
    let mut out = json!({ "description": answer.says });
    if let Some(Content { media_type, schema }) = answer.content {
        out["content"] = json!({ media_type: { "schema": schemas.of_answer(schema) } });
    }
    if !answer.headers.is_empty() {
        let headers = answer
            .headers
            .iter()
            .map(|name| ((*name).to_owned(), json!({ "$ref": format!("#/components/headers/{name}") })));
        out["headers"] = Value::Object(headers.collect());
    }
    out
}

fn placeholders(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

fn in_path(name: &str) -> Value {
    let known = IN_PATHS.iter().find(|(known, ..)| *known == name);
    let (_, says, pattern) = known.copied().unwrap_or((name, "", "."));
    json!({
        "name": name,
        "in": "path",
        "required": true,
        "description": says,
        "schema": { "type": "string", "minLength": 1, "pattern": pattern },
    })
}

fn in_query(object: &Value) -> Vec<Value> {
    let required = |name: &String| object["required"].as_array().is_some_and(|all| all.contains(&json!(name)));
    let properties = object["properties"].as_object().into_iter().flatten();
    let parameter = |(name, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        let says = schema.as_object_mut().and_then(|fields| fields.remove("description"));
        json!({ "name": name, "in": "query", "required": required(name), "description": says, "schema": schema })
    };
    properties.map(parameter).collect()
}

/// The fields of a query: it is text, so nothing in it is null.
fn of_query(schema: SchemaOf) -> Value {
    let mut alone = SchemaSettings::draft2020_12().for_deserialize();
    alone.inline_subschemas = true;
    let mut schema = schema(&mut alone.into_generator());
    RecursiveTransform(absent_is_not_null).transform(&mut schema);
    schema.to_value()
}

/// Schemas of requests, where what may be absent may be null, and of answers, where it is never null.
struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
            settings
        };
        let answers = settings().for_serialize().with_transform(RecursiveTransform(absent_is_not_null));
        Self { requests: settings().for_deserialize().into_generator(), answers: answers.into_generator() }
    }

    fn of_request(&mut self, schema: SchemaOf) -> Value {
        schema(&mut self.requests).to_value()
    }

    fn of_answer(&mut self, schema: SchemaOf) -> Value {
        schema(&mut self.answers).to_value()
    }

    /// A request of this schema cannot be empty.
    fn has_required(&self, schema: &Value) -> bool {
        let named = schema["$ref"].as_str().and_then(|at| at.rsplit('/').next());
        named.and_then(|name| self.requests.definitions().get(name)).is_some_and(|object| {
            object["required"].as_array().is_some_and(|fields| !fields.is_empty()) || object.get("anyOf").is_some()
        })
    }

    fn components(mut self) -> Map<String, Value> {
        let mut out = self.requests.take_definitions(true);
        for (name, schema) in self.answers.take_definitions(true) {
            debug_assert!(out.get(&name).is_none_or(|other| *other == schema), "two schemas are called {name}");
            out.insert(name, schema);
        }
        out
    }
}

/// Takes `null` from fields that may be absent.
fn absent_is_not_null(schema: &mut schemars::Schema) {
    let required: Vec<String> =
        schema.get("required").and_then(|all| serde_json::from_value(all.clone()).ok()).unwrap_or_default();
    let properties = schema.as_object_mut().and_then(|fields| fields.get_mut("properties"));
    let Some(Value::Object(properties)) = properties else { return };
    for (_, property) in properties.iter_mut().filter(|(name, _)| !required.contains(name)) {
        let Some(property) = property.as_object_mut() else { continue };
        if let Some(Value::Array(types)) = property.get_mut("type") {
            types.retain(|kind| kind != "null");
            if let [one] = types.as_slice() {
                let one = one.clone();
                property.insert("type".to_owned(), one);
            }
        }
        if let Some(Value::Array(values)) = property.get_mut("enum") {
            values.retain(|value| !value.is_null());
        }
        if let Some(Value::Array(choices)) = property.get_mut("anyOf") {
            choices.retain(|choice| choice["type"] != "null");
            if let [one] = choices.as_slice() {
                let one = one.clone();
                property.remove("anyOf");
                property.extend(one.as_object().cloned().unwrap_or_default());
            }
        }
    }
}
