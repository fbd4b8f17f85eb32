use super::*;
use crate::reaper::Adoption;

const SOON: Duration = Duration::from_secs(20);

fn registry() -> Arc<Registry> {
    Registry::new(Arc::new(Reaper::start(Adoption::OwnChildren).unwrap()))
}

fn request(id: &str) -> Create {
    // A shell without the prompts and start files of whoever runs the tests.
    let environment = [("HOME", "/nonexistent"), ("PS1", "$ ")].map(|(a, b)| (a.to_owned(), b.to_owned())).into();
    let envs = [("SHOWN".to_owned(), "yes".to_owned())].into();
    Create {
        id: Some(id.to_owned()),
        command: None,
        user: None,
        cwd: Some("/".to_owned()),
        envs,
        environment,
        cols: 91,
        rows: 17,
        lazy_start: false,
    }
}

/// What the terminal shows until it has shown `text`.
async fn until(attached: &mut Attached, text: &str) -> String {
    let mut seen = String::from_utf8_lossy(&attached.before).into_owned();
    while !seen.contains(text) {
        let chunk = timeout(SOON, attached.output.recv()).await.expect("the terminal shows nothing");
        seen += &String::from_utf8_lossy(&chunk.unwrap_or_else(|| panic!("the terminal ended at {seen:?}")));
    }
    seen
}

async fn ended(registry: &Registry, id: &str) {
    let mut watch = registry.find(id).unwrap().ended.subscribe();
    timeout(SOON, watch.wait_for(|ended| *ended)).await.expect("the shell does not end").unwrap();
}

#[tokio::test]
async fn a_shell_has_its_terminal_size_and_environment() {
    let registry = registry();
    let made = registry.create(request("one")).unwrap();
    assert!(made.active && made.cwd == "/" && made.envs.len() == 1);
    let mut attached = registry.attach("one").unwrap();
    attached.input.write(b"stty size; tty; echo $SHOWN:$TERM:$((40 + 2))\n").await.unwrap();
    let seen = until(&mut attached, "yes:xterm-256color:42").await;
    assert!(seen.contains("17 91") && seen.contains("/dev/pts/"), "{seen}");
    let resized = registry.resize("one", 100, 30).unwrap();
    assert_eq!((resized.cols, resized.rows), (100, 30));
    attached.input.write(b"stty size\n").await.unwrap();
    until(&mut attached, "30 100").await;
    registry.delete("one").await.unwrap();
    assert!(matches!(registry.get("one"), Err(TerminalError::NotFound(_))));
    while timeout(SOON, attached.output.recv()).await.expect("the reader is not told of the end").is_some() {}
}

#[tokio::test]
async fn who_attaches_later_sees_what_was_shown_and_the_shell_goes_on() {
    let registry = registry();
    registry.create(request("t")).unwrap();
    let mut first = registry.attach("t").unwrap();
    first.input.write(b"variable=kept; echo be''gun\n").await.unwrap();
    until(&mut first, "begun").await;
    drop(first);
    let mut second = registry.attach("t").unwrap();
    assert!(String::from_utf8_lossy(&second.before).contains("begun"));
    let mut third = registry.attach("t").unwrap();
    second.input.write(b"echo still-$variable\n").await.unwrap();
    until(&mut second, "still-kept").await;
    until(&mut third, "still-kept").await;
    registry.delete("t").await.unwrap();
}

#[tokio::test]
async fn what_nobody_reads_is_kept_up_to_a_bound() {
    let registry = registry();
    registry.create(request("t")).unwrap();
    let attached = registry.attach("t").unwrap();
    attached.input.write(b"seq 200000; exit 3\n").await.unwrap();
    drop(attached);
    ended(&registry, "t").await;
    let after = registry.attach("t").unwrap();
    assert!(after.before.len() <= KEPT);
    assert!(String::from_utf8_lossy(&after.before).contains("199999\r\n200000"));
    let mut output = after.output;
    assert!(output.recv().await.is_none(), "a shell that has ended shows nothing more");
    after.input.write(b"keys").await.unwrap();
    assert!(!registry.get("t").unwrap().active);
}

#[tokio::test]
async fn a_lazy_shell_starts_with_its_first_reader() {
    let registry = registry();
    let lazy = |id| Create { lazy_start: true, ..request(id) };
    let made = registry.create(lazy("t")).unwrap();
    assert!(made.lazy_start && !made.active);
    let mut attached = registry.attach("t").unwrap();
    attached.input.write(b"echo he''re\n").await.unwrap();
    until(&mut attached, "here").await;
    assert!(registry.get("t").unwrap().active);
    registry.delete("t").await.unwrap();
    let nowhere = Create { cwd: Some("/nowhere".to_owned()), ..lazy("u") };
    assert!(matches!(registry.create(nowhere), Err(TerminalError::Exec(ExecError::Directory { .. }))));
}

#[tokio::test]
async fn a_deleted_shell_dies_with_what_it_runs_in_front_even_if_that_ignores_a_hang_up() {
    let registry = registry();
    registry.create(request("t")).unwrap();
    let mut attached = registry.attach("t").unwrap();
    attached
        .input
        .write(b"trap '' HUP; (trap '' HUP; echo pi''d $BASHPID; while :; do sleep 1; done)\n")
        .await
        .unwrap();
    let seen = until(&mut attached, "pid ").await;
    let shell = registry.find("t").unwrap();
    timeout(SOON, registry.delete("t")).await.expect("the delete hangs").unwrap();
    assert!(*shell.ended.borrow(), "{seen}");
}

#[tokio::test]
async fn ids_are_unique_and_terminals_bounded() {
    let registry = registry();
    let lazy = |id: Option<String>| Create { id, lazy_start: true, ..request("") };
    registry.create(lazy(Some("a".to_owned()))).unwrap();
    assert!(matches!(registry.create(lazy(Some("a".to_owned()))), Err(TerminalError::Exists(_))));
    for _ in 1..TERMINALS {
        registry.create(lazy(None)).unwrap();
    }
    assert!(matches!(registry.create(lazy(None)), Err(TerminalError::TooMany)));
    // One that has ended makes room.
    let attached = registry.attach("a").unwrap();
    attached.input.write(b"exit\n").await.unwrap();
    ended(&registry, "a").await;
    registry.create(lazy(None)).unwrap();
    assert!(matches!(registry.get("a"), Err(TerminalError::NotFound(_))));
    let ids: std::collections::BTreeSet<_> = registry.list().items.into_iter().map(|t| t.id).collect();
    assert_eq!(ids.len(), TERMINALS);
}

#[tokio::test]
async fn a_command_in_place_of_the_shell_leaves_its_exit_status() {
    let registry = registry();
    let run = |id: &str, line: &str| registry.create(Create { command: Some(line.to_owned()), ..request(id) }).unwrap();
    for (id, line, code) in [("a", "test -t 0 && exit 7", 7), ("b", "kill -TERM $$", 143), ("c", "true", 0)] {
        assert_eq!(run(id, line).exit_code, None);
        ended(&registry, id).await;
        assert_eq!(registry.get(id).unwrap().exit_code, Some(code), "{line}");
    }
    let nobody = Create { user: Some("no-such-user".to_owned()), ..request("d") };
    assert!(matches!(registry.create(nobody), Err(TerminalError::Exec(ExecError::User { .. }))));
}
