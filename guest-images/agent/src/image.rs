//! What the image that the guest's disk was made from says about the processes in it: environment, user and working directory of every command,
//! and the program that the image is made for. The supervisor tells it once after each boot (`POST /v1/image`); a guest of the operator's own
//! templates is never told.
//!
//! The program is started then, with the sandbox's environment over the image's, and not again when it ends: what it was for is over, or its
//! user restarts it. What it writes goes to a file of the guest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;

use stasis_agent::protocol::{ImageReply, ImageRequest};

use crate::accounts::{Account, Accounts};
use crate::chain;
use crate::exec::{self, ExecError};
use crate::reaper::Reaper;

/// What the image's program writes.
const LOG: &str = "/var/log/stasis-image.log";

/// Defaults of every command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) env: BTreeMap<String, String>,
    /// A name or a number, with `:` and a group if it likes.
    pub(crate) user: Option<String>,
    pub(crate) workdir: String,
}

/// Set once: a boot is of one image. Everything that starts processes asks for it.
static TOLD: OnceLock<(Image, ImageReply)> = OnceLock::new();

/// The image, once the guest was told of it.
pub(crate) fn told() -> Option<&'static Image> {
    TOLD.get().map(|(image, _)| image)
}

/// Takes the image's defaults on and starts its program. Said again, it changes nothing and answers as before.
pub(crate) fn tell(reaper: &Reaper, request: ImageRequest) -> ImageReply {
    let begin = || {
        let image = Image { env: request.env, user: request.user, workdir: request.workdir };
        let reply = match start(reaper, &image, &request.command, &request.command_env, Path::new(LOG)) {
            Ok(started) => ImageReply { started, error: None },
            Err(error) => ImageReply { started: false, error: Some(chain(&error)) },
        };
        (image, reply)
    };
    TOLD.get_or_init(begin).1.clone()
}

/// Starts the program; false when there is none.
fn start(
    reaper: &Reaper,
    image: &Image,
    line: &[String],
    env: &BTreeMap<String, String>,
    log: &Path,
) -> Result<bool, ExecError> {
    let Some((program, arguments)) = line.split_first() else { return Ok(false) };
    let account = exec::user_in(Some(image), None)?;
    let mut command = exec::command_in(Some(image), program, None, &account, env)?;
    command.args(arguments).stdin(Stdio::null());
    // A guest that cannot keep the log still gets its program.
    let output = open_log(log).and_then(|file| Ok((file.try_clone()?, file)));
    match output {
        Ok((stdout, stderr)) => command.stdout(stdout).stderr(stderr),
        Err(_) => command.stdout(Stdio::null()).stderr(Stdio::null()),
    };
    let failed = |source| ExecError::Start { program: program.clone(), source };
    let process = reaper.spawn(&mut command).map_err(failed)?;
    let program = program.clone();
    tokio::spawn(async move {
        if let Ok(status) = process.exited.await {
            eprintln!("stasis-agent: the image's program {program} has ended: {status:?}");
        }
    });
    Ok(true)
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    File::options().create(true).append(true).open(path)
}

/// The account that an image means by `user`: `name`, `number`, either with `:` and a group. With a group, it is in no others.
pub(crate) fn account(accounts: &Accounts, user: &str) -> Option<Account> {
    let (name, group) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let mut account = accounts.user(name).or_else(|| (name == "root").then(|| accounts.user("0")).flatten())?;
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        account.gid = accounts.gid(group)?;
        account.groups.clear();
    }
    Some(account)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::reaper::Adoption;

    fn image(user: Option<&str>, workdir: &str) -> Image {
        Image {
            env: [("GREETING", "hello"), ("WHO", "image")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            user: user.map(str::to_owned),
            workdir: workdir.to_owned(),
        }
    }

    #[test]
    fn users_are_read_as_images_write_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), "app:x:1000:1001::/home/app:/bin/sh\n").unwrap();
        fs::write(dir.path().join("etc/group"), "web:x:33:app\n").unwrap();
        let accounts = Accounts::read(dir.path());
        let ids = |user: &str| account(&accounts, user).map(|a| (a.uid, a.gid, a.groups));
        assert_eq!(ids("app"), Some((1000, 1001, vec![33])));
        assert_eq!(ids("app:web"), Some((1000, 33, vec![])));
        assert_eq!(ids("1000:5"), Some((1000, 5, vec![])));
        assert_eq!(ids("7:"), Some((7, 7, vec![])));
        assert_eq!(ids("root"), Some((0, 0, vec![])));
        assert_eq!((ids("nobody"), ids("app:nobody")), (None, None));
    }

    #[tokio::test]
    async fn the_program_runs_where_and_with_what_the_image_says() {
        let dir = tempfile::tempdir().unwrap();
        let workdir = fs::canonicalize(dir.path()).unwrap().display().to_string();
        let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
        let image = image(None, &workdir);
        let line = ["sh", "-c", "echo $GREETING $WHO $PWD; echo done > ended"].map(str::to_owned);
        let env = [("WHO".to_owned(), "sandbox".to_owned())].into();
        let log = dir.path().join("log/image");
        assert!(start(&reaper, &image, &line, &env, &log).unwrap());
        let ended = dir.path().join("ended");
        let wait = async {
            while !ended.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), wait).await.unwrap();
        assert_eq!(fs::read_to_string(log).unwrap(), format!("hello sandbox {workdir}\n"));
    }

    #[tokio::test]
    async fn an_image_without_a_program_and_one_that_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
        let image = image(None, "/");
        let log = dir.path().join("log");
        assert!(!start(&reaper, &image, &[], &BTreeMap::new(), &log).unwrap());
        let missing = ["/no/such/program".to_owned()];
        assert!(start(&reaper, &image, &missing, &BTreeMap::new(), &log).is_err());
    }
}
