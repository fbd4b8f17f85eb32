//! The command line.

use super::exit;
use clap::{Args as ClapArgs, Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Sandboxes that sleep in an object store.
#[derive(Debug, Parser)]
#[command(name = "stasis", version, after_help = exit::HELP)]
pub(super) struct Args {
    /// Print answers as JSON.
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Which supervisor to talk to, and as whom.
#[derive(Debug, ClapArgs)]
pub(super) struct Connection {
    /// URL of the supervisor [default: what `stasis dev` wrote down, else http://127.0.0.1:7878].
    #[arg(long, global = true, env = "STASIS_URL")]
    pub(super) url: Option<String>,
    /// API key [default: what `stasis dev` wrote down].
    #[arg(long, global = true, env = "STASIS_API_KEY", hide_env_values = true)]
    pub(super) api_key: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the supervisor.
    Serve(Serve),
    /// Run everything on this machine: an S3 server, the supervisor, a key.
    Dev(Dev),
    /// Manage API keys, on the host of the supervisor.
    Key(Key),
    /// List the templates of an image directory, on the host of the supervisor. Notes their digests beside them.
    Templates(Templates),
    /// Delete from the bucket what no sandbox needs any more: found unreachable by two passes, at least the grace apart.
    Gc(Gc),
    /// Check every digest of a sandbox's snapshot, or of everything in the bucket.
    Verify(Verify),
    /// Find sandboxes whose head names a snapshot that is not whole, and the newest one that is. Changes nothing without --apply.
    Repair(Repair),
    /// The operator's keys, under which snapshots are sealed.
    Seal(Seal),
    /// Print what a shell needs to complete this command line.
    Completion(super::completion::Completion),
    #[command(flatten)]
    Client(Client),
}

/// Verbs that talk to a supervisor.
#[derive(Debug, Subcommand)]
pub(super) enum Client {
    /// Make a sandbox and wait until it runs.
    Create(Create),
    /// List sandboxes.
    Ls(Ls),
    /// Show a sandbox.
    Get(One),
    /// Run a command in a sandbox; wakes it when it is paused.
    Exec(Exec),
    /// Put a sandbox to sleep; done when that is durable.
    Pause(One),
    /// Wake a sandbox.
    Resume(One),
    /// Stop a sandbox: its disk is kept, what it has in memory is not.
    Stop(One),
    /// Start a stopped sandbox.
    Start(One),
    /// Delete sandboxes. What slept in the bucket can be put back until `stasis gc` purges it.
    Rm(Many),
    /// Put a deleted sandbox back, paused as it was at its last pause.
    Undelete(One),
    /// Show what a guest wrote to its console.
    Logs(super::logs::Logs),
    /// Copy files and directories into a sandbox (cp file sbx-…:/path) or out of it; wakes it when it is paused.
    Cp(super::copy::Copy),
    /// Files of a sandbox, where they are; wakes it when it is paused, as the next two do.
    #[command(subcommand)]
    Fs(super::files::Files),
    /// git in a sandbox.
    #[command(subcommand)]
    Git(super::git::Git),
    /// Terminals of a sandbox. `exec -t` makes one for a command.
    #[command(subcommand)]
    Pty(super::sessions::Pty),
    /// Named snapshots of sandboxes.
    #[command(subcommand)]
    Snapshot(super::snapshot::Snapshot),
    /// Show the sandboxes as they change, with what their last pauses and resumes cost.
    Top(super::top::Top),
    /// Presigned URLs: names by which a port of a sandbox is reached without a key.
    #[command(subcommand)]
    Url(super::presigned::Url),
    /// Make templates from container images.
    Template(Template),
    /// Show what a sandbox may reach, what it reached, and what it was refused and why.
    Network(One),
    /// Show what is in the bucket for a sandbox.
    Inspect(One),
    /// Take up paused sandboxes that are in the bucket and unknown here.
    Recover(Recover),
}

#[derive(Debug, ClapArgs)]
pub(super) struct Serve {
    /// Configuration file (TOML).
    #[arg(long, env = "STASIS_CONFIG")]
    pub(super) config: Option<PathBuf>,
    /// Address of the API.
    #[arg(long)]
    pub(super) listen: Option<String>,
    /// Journal, run directories, scratch.
    #[arg(long)]
    pub(super) data_dir: Option<String>,
    /// Directory with templates/.
    #[arg(long)]
    pub(super) images_dir: Option<String>,
    /// The program stasis-vmm.
    #[arg(long)]
    pub(super) vmm: Option<String>,
    /// At the end pause all running sandboxes, instead of leaving them to the next start.
    #[arg(long, env = "STASIS_PAUSE_ALL")]
    pub(super) pause_all: bool,
    /// Domain whose names are sandboxes: <id>.<domain>, <id>-<port>.<domain>; with a port if clients need one.
    #[arg(long)]
    pub(super) domain: Option<String>,
    /// Certificate chain (PEM) for the API's name, the domain and *.domain.
    #[arg(long, requires = "tls_key")]
    pub(super) tls_cert: Option<String>,
    /// Its private key (PEM).
    #[arg(long, requires = "tls_cert")]
    pub(super) tls_key: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Dev {
    /// Where everything is kept [default: $XDG_DATA_HOME/stasis or ~/.local/share/stasis].
    #[arg(long, env = "STASIS_DATA_DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Directory with templates/ [default: target/images of a build tree, else share/stasis/images of the prefix].
    #[arg(long, env = "STASIS_IMAGES_DIR")]
    pub(super) images_dir: Option<PathBuf>,
    /// Address of the API; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:7878")]
    pub(super) listen: SocketAddr,
    /// Address of the embedded S3 server; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:7879")]
    pub(super) s3_listen: SocketAddr,
    /// Domain whose names are sandboxes. Its certificate is made here [default: sandbox.localhost and the port of --listen].
    #[arg(long)]
    pub(super) domain: Option<String>,
    /// The program stasis-vmm [default: beside this one].
    #[arg(long, env = "STASIS_VMM")]
    pub(super) vmm: Option<PathBuf>,
    /// Write address and key here instead of to the user's client configuration.
    #[arg(long)]
    pub(super) profile: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Templates {
    /// Directory with templates/ [default: target/images of a build tree, else share/stasis/images of the prefix].
    #[arg(long, env = "STASIS_IMAGES_DIR")]
    pub(super) images_dir: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Template {
    #[command(subcommand)]
    pub(super) verb: TemplateVerb,
}

#[derive(Debug, Subcommand)]
pub(super) enum TemplateVerb {
    /// Make a template from an image, and wait until sandboxes can be made from it.
    Create(TemplateCreate),
    /// List the templates that sandboxes can be made from, and those that are being made or could not be.
    Ls,
    /// Show a template.
    Get(One),
    /// Give a template another name.
    Rename {
        /// Its id.
        id: String,
        /// The name.
        name: String,
    },
    /// Delete templates that no sandbox and no snapshot needs.
    Rm(Many),
}

#[derive(Debug, ClapArgs)]
pub(super) struct TemplateCreate {
    /// Its name.
    pub(super) name: String,
    /// The image: docker.io/library/python:3.12, or on the supervisor's host oci:PATH[:NAME], oci-archive:PATH[:NAME],
    /// docker-archive:PATH[:NAME].
    pub(super) image: String,
    /// User name for the registry; the password is in STASIS_REGISTRY_PASSWORD.
    #[arg(long)]
    pub(super) username: Option<String>,
}

/// Which bucket, for verbs that work on it without a supervisor. They take the supervisor's configuration: the file, and the variables STASIS_….
/// Without any, it is the bucket of the `stasis dev` of this user, which must be running.
#[derive(Debug, ClapArgs)]
pub(super) struct Bucket {
    /// Configuration file of the supervisor (TOML).
    #[arg(long, env = "STASIS_CONFIG")]
    pub(super) config: Option<PathBuf>,
    /// Only this tenant's objects.
    #[arg(long)]
    pub(super) tenant: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Gc {
    #[command(flatten)]
    pub(super) bucket: Bucket,
    /// Time between two passes after which what both found unreachable is deleted; and from the first pass after a delete until the sandbox
    /// cannot be put back. Must be longer than twice any upload. A number with s, m, h or d.
    #[arg(long, default_value = "72h", value_parser = duration)]
    pub(super) grace: Duration,
    /// Say what would be deleted; change nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Verify {
    #[command(flatten)]
    pub(super) bucket: Bucket,
    /// The sandbox.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(super) id: Option<String>,
    /// Everything in the bucket.
    #[arg(long)]
    pub(super) all: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Seal {
    #[command(subcommand)]
    pub(super) verb: SealVerb,
}

#[derive(Debug, Subcommand)]
pub(super) enum SealVerb {
    /// Make a key in a file that nobody else can read, and print its id.
    Key {
        /// The file, which must not exist.
        #[arg(long)]
        out: PathBuf,
    },
    /// Move what sleeps in the bucket from old keys (seal.old_key_files) to the current one (seal.key_file), and say which keys are still needed.
    Rotate(Rotate),
}

#[derive(Debug, ClapArgs)]
pub(super) struct Rotate {
    #[command(flatten)]
    pub(super) bucket: Bucket,
    /// Say what would be moved; change nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Sandboxes and snapshots moved at most; the next call goes on.
    #[arg(long)]
    pub(super) limit: Option<usize>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Repair {
    #[command(flatten)]
    pub(super) bucket: Bucket,
    /// Read every pack instead of only looking whether it is there.
    #[arg(long)]
    pub(super) deep: bool,
    /// Make the heads that can be repaired name the newest whole snapshot. What was done after that snapshot is lost.
    #[arg(long)]
    pub(super) apply: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Key {
    /// Data directory of the supervisor [default: that of `stasis dev`].
    #[arg(long, env = "STASIS_DATA_DIR", global = true)]
    pub(super) data_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) verb: KeyVerb,
}

#[derive(Debug, Subcommand)]
pub(super) enum KeyVerb {
    /// Make a key; it is shown once.
    Create {
        /// Whose sandboxes it reaches.
        #[arg(long, default_value = "dev")]
        tenant: String,
        /// For people.
        #[arg(long, default_value = "")]
        label: String,
    },
    /// List keys.
    List,
    /// Refuse a key from now on.
    Revoke {
        /// Id, as listed.
        id: String,
    },
}

#[derive(Debug, ClapArgs)]
pub(super) struct Create {
    /// Template.
    #[arg(long)]
    pub(super) template: Option<String>,
    /// vCPUs, 1 to 8.
    #[arg(long)]
    pub(super) vcpu: Option<u64>,
    /// Memory, MiB.
    #[arg(long)]
    pub(super) memory: Option<u64>,
    /// Life, seconds.
    #[arg(long)]
    pub(super) timeout: Option<u64>,
    /// Pause instead of deleting when the life is over.
    #[arg(long)]
    pub(super) auto_pause: bool,
    /// Environment of every command, NAME=VALUE; may be repeated.
    #[arg(long = "env", short = 'e', value_parser = variable)]
    pub(super) env: Vec<(String, String)>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Ls {
    /// Only those in this state.
    #[arg(long)]
    pub(super) state: Option<String>,
    /// Page, from 1.
    #[arg(long, default_value_t = 1)]
    pub(super) page: u32,
    /// Sandboxes a page, at most 100.
    #[arg(long, default_value_t = 100)]
    pub(super) page_size: u32,
    /// By what: created_at or state.
    #[arg(long)]
    pub(super) sort: Option<String>,
    /// asc or desc.
    #[arg(long)]
    pub(super) order_by: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct One {
    /// Its id.
    pub(super) id: String,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Many {
    /// Their ids.
    #[arg(required = true)]
    pub(super) ids: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Recover {
    /// Also take sandboxes that another supervisor holds. Only when that supervisor is gone for good: its guests may still run otherwise.
    #[arg(long)]
    pub(super) take_over: bool,
}

#[derive(Debug, ClapArgs)]
pub(super) struct Exec {
    /// The sandbox.
    pub(super) id: String,
    /// Give it a terminal: this one. Without a command, a shell.
    #[arg(long, short)]
    pub(super) tty: bool,
    /// Pass on what is typed; a terminal always does, and without one there is no standard input.
    #[arg(long, short, requires = "tty")]
    pub(super) interactive: bool,
    /// User, by name or number [default: root].
    #[arg(long)]
    pub(super) user: Option<String>,
    /// Working directory.
    #[arg(long)]
    pub(super) cwd: Option<String>,
    /// Environment, NAME=VALUE; may be repeated.
    #[arg(long = "env", short = 'e', value_parser = variable)]
    pub(super) env: Vec<(String, String)>,
    /// Time limit, seconds.
    #[arg(long)]
    pub(super) timeout: Option<u64>,
    /// The command: one word is given to /bin/sh as it is, several are quoted first.
    #[arg(required_unless_present = "tty", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "must be a number with s, m, h or d, such as 72h".to_owned();
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be NAME=VALUE".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_follows_the_id_of_exec_is_the_command() {
        let args = Args::try_parse_from(["stasis", "exec", "sbx-a", "ls", "-l", "--json"]).unwrap();
        assert!(!args.json);
        let Command::Client(Client::Exec(exec)) = args.command else { panic!("not exec") };
        assert_eq!(exec.command, ["ls", "-l", "--json"]);
        let args = Args::try_parse_from(["stasis", "exec", "-it", "--user", "ann", "sbx-a", "vi", "-R", "x"]).unwrap();
        let Command::Client(Client::Exec(exec)) = args.command else { panic!("not exec") };
        assert_eq!((exec.tty, exec.interactive, exec.user.as_deref()), (true, true, Some("ann")));
        assert_eq!(exec.command, ["vi", "-R", "x"]);
        assert!(Args::try_parse_from(["stasis", "exec", "-t", "sbx-a"]).is_ok(), "a shell");
        assert!(Args::try_parse_from(["stasis", "exec", "sbx-a"]).is_err(), "no command");
        assert!(Args::try_parse_from(["stasis", "exec", "-i", "sbx-a", "cat"]).is_err(), "no standard input");
    }

    #[test]
    fn no_argument_is_taken_for_the_address_of_the_supervisor() {
        let args = Args::try_parse_from(["stasis", "url", "rm", "sbx-a", "psu-b"]).unwrap();
        assert_eq!(args.connection.url.filter(|url| url == "psu-b"), None);
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("72h"), Ok(Duration::from_hours(72)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for bad in ["", "h", "72", "-1h", "1w", "99999999999999999d", "1é"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
