//! Guests of container images: after a boot, or after a restore of the booted template, they are told what their image says about the processes
//! in it, and start its program. A wake tells them nothing: they know.

use super::Core;
use crate::agent_client::AgentFailure;
use crate::error::Error;
use crate::image::Process;
use crate::registry::Sandbox;
use crate::template::Template;
use stasis_agent::protocol::ImageRequest;
use std::time::Duration;

/// One try.
const ANSWER: Duration = Duration::from_secs(10);

impl Core {
    /// Tells the guest of `sandbox`, which runs, of the image that `template` was made from. Nothing for other templates.
    pub(super) async fn tell_image(&self, sandbox: &Sandbox, template: &Template) -> Result<(), Error> {
        let Some(upload) = &template.upload else { return Ok(()) };
        let vm = sandbox.vm().ok_or(Error::Bug("a guest without a VM"))?;
        let request = request(&upload.process, sandbox.record().spec.env_vars);
        let (agent, limit) = (self.agent(&vm), self.config.deadlines.wake());
        let tell = async {
            let mut pause = Duration::from_millis(2);
            loop {
                match agent.image(&request, ANSWER).await {
                    Ok(reply) => return Ok(reply),
                    // Its listener may need a moment after a restore, and being told twice changes nothing.
                    Err(AgentFailure::Connection(_) | AgentFailure::Deadline(_)) => {}
                    Err(failure) => {
                        let what = failure.to_string();
                        return Err(Error::Agent { id: sandbox.id.clone(), action: "take its image on", what });
                    }
                }
                tokio::select! {
                    () = vm.wait_ended() => return Err(Error::VmmEnded { id: sandbox.id.clone(), reason: vm.exit_reason() }),
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(100)),
                }
            }
        };
        let what = "the agent's answer to its image";
        let reply = tokio::time::timeout(limit, tell).await.map_err(|_| Error::Deadline {
            id: sandbox.id.clone(),
            what,
            ms: limit.as_millis(),
        })??;
        if let Some(error) = reply.error {
            // The sandbox is as good for commands as before.
            tracing::warn!(id = %sandbox.id, error, "the image's program was not started");
        }
        Ok(())
    }
}

fn request(process: &Process, env_vars: std::collections::BTreeMap<String, String>) -> ImageRequest {
    let workdir = process.working_dir.as_deref().unwrap_or("/");
    ImageRequest {
        env: process.env.clone(),
        user: process.user.clone(),
        // A relative one is relative to the top, as container engines read it.
        workdir: format!("/{}", workdir.trim_start_matches('/')),
        command: process.command(),
        command_env: env_vars,
    }
}
