//! What processes say to each other: the control API of the VMM (neither side trusts the other), and the agent's protocol (the supervisor does not
//! trust a guest).

use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_agent::protocol;
use stasis_vmm::control::types;
use std::fmt::Debug;

use super::alloc::peak_of;

/// Bytes that a body may allocate at most while it is read: nothing in these types is a tree, and the smallest entry of a list is a few bytes of
/// JSON for one string.
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

/// The first byte chooses the type, the rest is the body.
pub fn control(input: &[u8]) {
    let Some((&kind, json)) = input.split_first() else { return };
    match kind % 9 {
        0 => one::<types::BootRequest>(json),
        1 => one::<types::RestoreRequest>(json),
        2 => one::<types::CaptureRequest>(json),
        3 => one::<types::VmStatus>(json),
        4 => one::<types::PauseReport>(json),
        5 => one::<types::CaptureReport>(json),
        6 => one::<types::RestoreReport>(json),
        7 => one::<types::Metrics>(json),
        _ => one::<types::ErrorBody>(json),
    }
}

/// The first byte chooses the type, the rest is the body.
pub fn agent(input: &[u8]) {
    let Some((&kind, json)) = input.split_first() else { return };
    match kind % 6 {
        0 => one::<protocol::Health>(json),
        1 => one::<protocol::ExecRequest>(json),
        2 => one::<protocol::ExecReply>(json),
        3 => one::<protocol::WakeRequest>(json),
        4 => one::<protocol::WakeReply>(json),
        _ => one::<protocol::AgentError>(json),
    }
}
