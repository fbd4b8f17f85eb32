//! A test binary of async tests, each of which may need something of the machine.
//!
//! What cannot run is reported as ignored, with the reason in its name: nothing is left out in silence.

use std::future::Future;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};

/// What a test answers.
pub type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Longest that one test may take.
const DEADLINE: Duration = Duration::from_mins(15);

/// Collects tests, then runs them.
#[derive(Default)]
pub struct Suite {
    trials: Vec<Trial>,
    left_out: Vec<String>,
}

impl Suite {
    /// Adds a test; with `lacking` it is not run, and the reason is said.
    #[must_use]
    pub fn test<F, T>(mut self, name: &str, lacking: impl Into<Option<String>>, run: F) -> Self
    where
        F: FnOnce() -> T + Send + 'static,
        T: Future<Output = Outcome> + Send + 'static,
    {
        let lacking = lacking.into();
        let runner = move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let outcome = runtime.block_on(async { tokio::time::timeout(DEADLINE, tokio::spawn(run())).await });
            runtime.shutdown_timeout(Duration::from_secs(5));
            match outcome {
                Err(_) => Err(Failed::from(format!("did not end within {} s", DEADLINE.as_secs()))),
                Ok(Err(panic)) => Err(Failed::from(panic.to_string())),
                Ok(Ok(Err(error))) => Err(Failed::from(stasis_vmm::control::refusal::chain(&*error))),
                Ok(Ok(Ok(()))) => Ok(()),
            }
        };
        if let Some(why) = &lacking {
            self.left_out.push(format!("{name}: {why}"));
        }
        self.trials.push(Trial::test(name, runner).with_ignored_flag(lacking.is_some()));
        self
    }

    /// Runs the tests that the command line selects; does not return.
    pub fn main(self) -> ! {
        let arguments = Arguments::from_args();
        if !arguments.list {
            for line in &self.left_out {
                eprintln!("left out: {line}");
            }
        }
        libtest_mimic::run(&arguments, self.trials).exit()
    }
}
