//! What processes say to each other: the control API of the VMM (neither side trusts the other), and the agent's protocol (the supervisor does not
//! trust a guest).

use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_agent::protocol::{self, Forwarded, MAX_FORWARD_LINE, files, git, terminals, trust};
use stasis_vmm::control::types;
use std::fmt::Debug;

use super::alloc::peak_of;

/// Bytes that a body may allocate at most while it is read. The costliest entry of a list or map is a string in three bytes of JSON; trees
/// ([`files::TreeItems`]) are no deeper than serde_json goes.
const fn bound(len: usize) -> usize {
    (16 << 10) + 32 * len
}

fn one<T: DeserializeOwned + Serialize + PartialEq + Debug>(json: &[u8]) {
    let (read, peak) = peak_of(|| serde_json::from_slice::<T>(json));
    assert!(peak <= bound(json.len()), "{peak} bytes for {} of input, at most {}", json.len(), bound(json.len()));
    if let Ok(value) = read {
        let again = serde_json::to_vec(&value).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<T>(&again).expect("what was written can be read"), value);
    }
}

/// Reads a body as one type.
type Reader = fn(&[u8]);

/// Bodies of the control API, and the note that a VMM leaves. Inputs of the corpus name a reader by its place: new ones go to the end.
const CONTROL: [Reader; 15] = [
    one::<types::BootRequest>,
    one::<types::RestoreRequest>,
    one::<types::CaptureRequest>,
    one::<types::VmStatus>,
    one::<types::PauseReport>,
    one::<types::CaptureReport>,
    one::<types::RestoreReport>,
    one::<types::Metrics>,
    one::<types::ErrorBody>,
    one::<types::PrepareRequest>,
    one::<types::KeepRequest>,
    one::<types::Connections>,
    one::<types::DirtyReport>,
    one::<types::ExitNote>,
    one::<types::MachineConfig>,
];

/// Bodies of the agent's protocol, and the lines of its forwarder. New ones go to the end here, too.
const AGENT: [Reader; 40] = [
    one::<protocol::Health>,
    one::<protocol::ExecRequest>,
    one::<protocol::ExecReply>,
    one::<protocol::WakeRequest>,
    one::<protocol::WakeReply>,
    one::<protocol::AgentError>,
    one::<protocol::ImageRequest>,
    one::<protocol::ImageReply>,
    one::<protocol::System>,
    one::<files::PathOnly>,
    one::<files::Ls>,
    one::<files::Listing>,
    one::<files::FileInfo>,
    one::<files::Mkdir>,
    one::<files::Write>,
    one::<files::Read>,
    one::<files::ReadMany>,
    one::<files::Delete>,
    one::<files::SetPermissions>,
    one::<files::Glob>,
    one::<files::Paths>,
    one::<files::Grep>,
    one::<files::Matches>,
    one::<files::EditFile>,
    one::<files::Edited>,
    one::<files::EditFiles>,
    one::<files::EditResults>,
    one::<files::Transfer>,
    one::<files::Exists>,
    one::<files::Tree>,
    one::<files::TreeItems>,
    one::<git::GitRequest>,
    one::<terminals::Create>,
    one::<terminals::TerminalId>,
    one::<terminals::Resize>,
    one::<terminals::Terminal>,
    one::<terminals::Terminals>,
    forward_lines,
    one::<trust::TrustRequest>,
    one::<trust::TrustReply>,
];

fn chosen(readers: &[Reader], input: &[u8]) {
    if let Some((&kind, body)) = input.split_first()
        && let Some(reader) = readers.get(usize::from(kind) % readers.len())
    {
        reader(body);
    }
}

/// What either side of the forwarder reads is written as it was read, on one line of bounded length.
fn forward_lines(line: &[u8]) {
    if let Some(port) = protocol::parse_forward_line(line) {
        let again = protocol::forward_line(port);
        assert_eq!(protocol::parse_forward_line(again.trim_end().as_bytes()), Some(port));
    }
    if let Some(answer) = Forwarded::parse(line) {
        let again = answer.line();
        assert!(again.len() <= MAX_FORWARD_LINE + 1 && again.find('\n') == Some(again.len() - 1), "{again:?}");
        assert!(Forwarded::parse(again.trim_end_matches('\n').as_bytes()).is_some(), "{again:?}");
    }
}

/// The first byte chooses the type, the rest is the body.
pub fn control(input: &[u8]) {
    chosen(&CONTROL, input);
}

/// The first byte chooses the type, the rest is the body.
pub fn agent(input: &[u8]) {
    chosen(&AGENT, input);
}
