//! Requests that need the guest: the sandbox is woken, its agent asked, and what the agent says becomes an answer or an error. They hold no
//! lock: a pause or a delete may cut them off, and then says so.

use super::Core;
use super::resume::ensure_running;
use crate::agent_client::{Agent, AgentFailure};
use crate::error::Error;
use crate::registry::{Sandbox, Visit};
use crate::states::State;
use crate::timing::Timing;
use crate::validate::FieldError;
use crate::vmm_process::Vmm;
use http::StatusCode;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

/// What a guest may answer with; everything else is its agent's failure.
const REFUSALS: [StatusCode; 6] = [
    StatusCode::BAD_REQUEST,
    StatusCode::FORBIDDEN,
    StatusCode::NOT_FOUND,
    StatusCode::CONFLICT,
    StatusCode::PAYLOAD_TOO_LARGE,
    StatusCode::INSUFFICIENT_STORAGE,
];

/// A guest that runs, for one request.
#[derive(Debug)]
pub struct Guest {
    core: Arc<Core>,
    sandbox: Arc<Sandbox>,
    vm: Arc<Vmm>,
    verb: &'static str,
    /// As long as it is there, no timer pauses the sandbox.
    visit: Option<Visit>,
    /// What a wake and the calls cost.
    pub timing: Timing,
}

/// Wakes the sandbox if it sleeps. `verb` completes "cannot … it now".
pub async fn reach(core: &Arc<Core>, sandbox: &Arc<Sandbox>, verb: &'static str) -> Result<Guest, Error> {
    let spec = sandbox.record().spec;
    if !spec.agent {
        return Err(Error::NoAgent { id: sandbox.id.clone(), template: spec.template_name });
    }
    let (_, timing) = ensure_running(core, sandbox, verb).await?;
    let gone = || Error::State { id: sandbox.id.clone(), state: sandbox.state(), verb };
    let vm = sandbox.vm().ok_or_else(gone)?;
    let visit = sandbox.visit(&core.sources);
    Ok(Guest { core: core.clone(), sandbox: sandbox.clone(), vm, verb, visit: Some(visit), timing })
}

impl Guest {
    /// Its agent.
    pub fn agent(&self) -> Agent {
        self.core.agent(&self.vm)
    }

    /// The sandbox's own variables with `over` over them.
    pub fn environment(&self, over: BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut env = self.sandbox.record().spec.env_vars;
        env.extend(over);
        env
    }

    /// From now on only what is noted with [`touch`](Self::touch) counts as use.
    pub fn may_sleep(&mut self) {
        self.visit = None;
    }

    /// Notes that somebody uses it.
    pub fn touch(&self) {
        self.sandbox.touched(self.core.sources.now_ms());
    }

    /// The guest does not run any more: it was paused, stopped or deleted, or its VM ended.
    pub fn is_gone(&self) -> bool {
        self.sandbox.state() != State::Running || self.vm.has_ended()
    }

    /// Waits for a call to the agent. `action` completes "its agent cannot …"; `phase` is its name in the timing.
    pub async fn call<T>(
        &mut self,
        phase: &'static str,
        action: &'static str,
        call: impl Future<Output = Result<T, AgentFailure>>,
    ) -> Result<T, Error> {
        self.touch();
        let begun = Instant::now();
        let outcome = call.await;
        self.timing.since(phase, begun);
        self.touch();
        outcome.map_err(|failure| self.failed(action, failure))
    }

    /// What a failed call means.
    fn failed(&self, action: &'static str, failure: AgentFailure) -> Error {
        let id = self.sandbox.id.clone();
        match failure {
            AgentFailure::Refused { status, message, field } => {
                let status = StatusCode::from_u16(status).ok().filter(|status| REFUSALS.contains(status));
                match (status, field) {
                    (Some(StatusCode::BAD_REQUEST), Some(field)) => {
                        Error::Invalid(vec![FieldError { field, error: message }])
                    }
                    (Some(status), _) => Error::Guest { status, message },
                    (None, _) => Error::Agent { id, action, what: message },
                }
            }
            AgentFailure::Deadline(after) => Error::Deadline { id, what: "the guest's answer", ms: after.as_millis() },
            // A pause or the end of the VM cuts the connection.
            AgentFailure::Connection(_) if self.is_gone() => {
                Error::State { id, state: self.sandbox.state(), verb: self.verb }
            }
            failure => Error::Agent { id, action, what: failure.to_string() },
        }
    }
}
