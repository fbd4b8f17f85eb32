//! What a guest is told after a restore, before anybody else reaches it: the time, fresh entropy, and, to a clone, who it is.

use super::Core;
use crate::agent_client::{Agent, AgentFailure};
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::registry::Sandbox;
use crate::vmm_process::Vmm;
use base64::Engine as _;
use stasis_agent::protocol::{ClockRequest, Identity, WakeRequest};
use std::time::{Duration, Instant};

/// One call.
const CALL: Duration = Duration::from_secs(10);
/// How late a guest's clock may be. Its kernel accepts a connection at once; the agent may be paged in only after that, for seconds where the
/// store is far, and does not know how long the request lay there.
const LATE: Duration = Duration::from_millis(100);
/// How often a guest whose answers stay slow is told the time again.
const AGAIN: u32 = 3;

impl Core {
    /// Who a clone is: its id is a host name, and its machine id is random.
    pub(super) fn new_identity(&self, sandbox: &Sandbox) -> Identity {
        Identity {
            hostname: sandbox.id.to_string(),
            // Of the same 128 random bits in hex; all zero is as likely as a repeated commit id.
            machine_id: self.commit_id().to_string(),
        }
    }

    /// Tells the guest that it was asleep: clock and entropy. Retried, since the agent's listener needs a moment after the transport reset.
    /// A clone is told who it is, too.
    pub(super) async fn tell_wake(&self, sandbox: &Sandbox, vm: &Vmm, identity: Option<Identity>) -> Result<(), Error> {
        if !sandbox.record().spec.agent {
            reach(Point::GuestTold);
            return Ok(());
        }
        let agent = self.agent(vm);
        let failed = |what: String| Error::Agent { id: sandbox.id.clone(), action: "be told of the wake", what };
        let tell = async {
            let mut pause = Duration::from_millis(1);
            loop {
                let mut asked = Instant::now();
                // Anew each time: the clock goes on, and entropy is never sent twice.
                let request = || {
                    asked = Instant::now();
                    WakeRequest {
                        unix_time_ns: self.unix_time_ns(),
                        entropy: base64::engine::general_purpose::STANDARD.encode(self.sources.random::<32>()),
                        identity: identity.clone(),
                    }
                };
                match agent.wake(request, CALL).await {
                    Ok(_) => {
                        reach(Point::GuestTold);
                        if asked.elapsed() > LATE {
                            self.tell_time(sandbox, &agent).await;
                        }
                        return Ok(());
                    }
                    Err(AgentFailure::Refused { status, message, .. }) => {
                        return Err(failed(format!("{status} {message}")));
                    }
                    Err(AgentFailure::Nonsense(what)) => return Err(failed(what)),
                    Err(AgentFailure::Connection(_) | AgentFailure::Deadline(_)) => {}
                }
                tokio::select! {
                    () = vm.wait_ended() => return Err(Error::VmmEnded { id: sandbox.id.clone(), reason: vm.exit_reason() }),
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(100)),
                }
            }
        };
        let limit = self.config.deadlines.wake();
        match tokio::time::timeout(limit, tell).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Deadline {
                id: sandbox.id.clone(),
                what: "the agent's answer to the wake",
                ms: limit.as_millis(),
            }),
        }
    }

    /// Tells the time until an answer is quick. A clock that stays a little late is no reason to fail a wake: an agent of an older snapshot
    /// does not know the call.
    async fn tell_time(&self, sandbox: &Sandbox, agent: &Agent) {
        for _ in 0..AGAIN {
            let mut asked = Instant::now();
            let request = || {
                asked = Instant::now();
                ClockRequest { unix_time_ns: self.unix_time_ns() }
            };
            match agent.clock(request, CALL).await {
                Ok(_) if asked.elapsed() <= LATE => return,
                Ok(reply) => {
                    let (took, stepped) = (asked.elapsed(), Duration::from_nanos(reply.stepped_ns.unsigned_abs()));
                    tracing::debug!(id = %sandbox.id, ?took, ?stepped, "told the time, slowly");
                }
                Err(error) => {
                    tracing::debug!(id = %sandbox.id, %error, "its clock may be late");
                    return;
                }
            }
        }
    }

    fn unix_time_ns(&self) -> u64 {
        u64::try_from(self.sources.now_ms()).unwrap_or(0).saturating_mul(1_000_000)
    }
}
