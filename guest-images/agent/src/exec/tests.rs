use std::time::Instant;

use super::*;
use crate::reaper::Adoption;

/// Longer than anything here takes on a busy machine, and shorter than a command may.
const HANG: Duration = Duration::from_secs(25);

fn request(command: &str) -> ExecRequest {
    ExecRequest {
        command: command.to_owned(),
        cwd: Some("/".to_owned()),
        user: None,
        env: [].into(),
        timeout_ms: 30_000,
        output_limit: 1 << 20,
    }
}

fn reaper() -> Reaper {
    Reaper::start(Adoption::OwnChildren).unwrap()
}

fn text(base64: &str) -> String {
    String::from_utf8(STANDARD.decode(base64).unwrap()).unwrap()
}

#[tokio::test]
async fn streams_and_status_are_kept_apart() {
    let reply = run(&reaper(), request("echo out; echo err >&2; exit 3")).await.unwrap();
    assert_eq!((reply.exit_code, reply.timed_out), (3, false));
    assert_eq!((text(&reply.stdout), text(&reply.stderr)), ("out\n".to_owned(), "err\n".to_owned()));
}

#[tokio::test]
async fn a_signal_is_128_and_its_number() {
    assert_eq!(run(&reaper(), request("kill -TERM $$")).await.unwrap().exit_code, 128 + 15);
}

#[tokio::test]
async fn directory_and_environment_are_the_request_s_over_the_default() {
    let mut request = request("pwd; echo $HOME $A; env | grep -c CARGO");
    request.cwd = Some("/usr".to_owned());
    request.env = [("A".to_owned(), "b c".to_owned()), ("HOME".to_owned(), "/nowhere".to_owned())].into();
    let reply = run(&reaper(), request).await.unwrap();
    // The agent's own environment does not leak in: no CARGO variable of the test run.
    assert_eq!(text(&reply.stdout), "/usr\n/nowhere b c\n0\n");
}

#[tokio::test]
async fn output_beyond_the_limit_is_read_dropped_and_counted() {
    let mut request = request("head -c 3000000 /dev/zero; head -c 10 /dev/zero >&2");
    request.output_limit = 1000;
    let reply = run(&reaper(), request).await.unwrap();
    assert_eq!((text(&reply.stdout).len(), reply.stdout_dropped), (1000, 2_999_000));
    assert_eq!((text(&reply.stderr).len(), reply.stderr_dropped), (10, 0));
    assert_eq!(reply.exit_code, 0);
}

#[tokio::test]
async fn a_timeout_kills_the_whole_group_and_keeps_the_output() {
    let mut request = request("echo begun; sleep 1000 & sleep 1000");
    request.timeout_ms = 300;
    let begun = Instant::now();
    let reply = run(&reaper(), request).await.unwrap();
    assert!(begun.elapsed() < HANG);
    assert_eq!((reply.exit_code, reply.timed_out, text(&reply.stdout)), (124, true, "begun\n".to_owned()));
}

#[tokio::test]
async fn a_background_process_is_not_waited_for_and_lives_on_with_its_pipe() {
    let reaper = reaper();
    let directory = tempfile::tempdir().unwrap();
    // It writes to the inherited pipe after the reply, and would die of SIGPIPE there without a reader.
    let background = "(while [ ! -e go ]; do sleep 0.01; done; seq 100000; echo survived > done) & echo started";
    let mut request = request(background);
    request.cwd = Some(directory.path().to_str().unwrap().to_owned());
    let begun = Instant::now();
    let reply = run(&reaper, request).await.unwrap();
    assert!(begun.elapsed() < HANG);
    assert_eq!((reply.exit_code, text(&reply.stdout)), (0, "started\n".to_owned()));

    std::fs::write(directory.path().join("go"), "").unwrap();
    let done = directory.path().join("done");
    while std::fs::read_to_string(&done).unwrap_or_default() != "survived\n" {
        assert!(begun.elapsed() < HANG, "the background process did not survive the reply");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn all_output_of_a_process_that_ends_at_once_is_kept() {
    let reaper = reaper();
    for _ in 0..20 {
        let reply = run(&reaper, request("seq 1 10000")).await.unwrap();
        assert_eq!(text(&reply.stdout).lines().count(), 10_000);
    }
}

/// A status may be collected before the runtime has looked at the pipes again, as happens when many commands end at once.
#[tokio::test]
async fn output_that_the_runtime_has_not_heard_of_is_kept() {
    let (reader, writer) = io::pipe().unwrap();
    let stream = Stream::new(Some(reader.into()), 1 << 20).unwrap();
    // Nothing is awaited from here on, so the runtime's view of the pipe stays that it is empty.
    rustix::io::write(&writer, b"last words").unwrap();
    assert_eq!(stream.finish(), (b"last words".to_vec(), 0));
    drop(writer);
}

#[tokio::test]
async fn what_cannot_be_started_is_an_error_that_names_it() {
    let mut missing = request("true");
    missing.cwd = Some("/no/such/directory".to_owned());
    assert!(run(&reaper(), missing).await.unwrap_err().to_string().contains("/no/such/directory"));
    let mut file = request("true");
    file.cwd = Some("/etc/passwd".to_owned());
    assert!(matches!(run(&reaper(), file).await, Err(ExecError::Directory { .. })));
    let mut name = request("true");
    name.env = [("A=B".to_owned(), String::new())].into();
    assert!(matches!(run(&reaper(), name).await, Err(ExecError::VariableName { .. })));
    let zero = request("echo \0");
    assert!(matches!(run(&reaper(), zero).await, Err(ExecError::Start { .. })));
}

#[tokio::test]
async fn a_command_runs_as_its_user_with_that_user_s_environment_and_groups() {
    let mut unknown = request("true");
    unknown.user = Some("no-such-user".to_owned());
    let error = run(&reaper(), unknown).await.unwrap_err();
    assert!(error.to_string().contains("no-such-user"), "{error}");
    if !geteuid().is_root() {
        eprintln!("left out: only root becomes somebody else");
        return;
    }
    let mut request = request("id -u; id -g; id -G; echo $USER $HOME; touch /root/x 2>/dev/null || echo refused");
    request.user = Some("4242".to_owned());
    let reply = run(&reaper(), request).await.unwrap();
    assert_eq!(text(&reply.stdout), "4242\n4242\n4242\n4242 /\nrefused\n");
}
