//! Resets of the device, saved states, and the transport-reset event.

use super::super::super::DeviceState;
use super::super::mux::HOST_PORTS;
use super::super::{RESET_HOLD, TRANSPORT_RESET};
use super::*;

#[test]
fn a_reset_of_the_device_closes_everything_and_a_new_driver_starts_afresh() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.accepted(1);
    guest.driver.start(64, !0);
    guest.driver.run(5);
    assert!(at_end(&mut client));
    guest.rx_buffers.clear();
    guest.give_all();
    guest.accepted(2);
}

#[test]
fn a_restored_device_resets_the_transport_before_anything_else() {
    let mut guest = Guest::ready();
    guest.give_event_buffer();
    let (mut client, ports) = guest.accepted(1);
    let next = guest.driver.migrate(model(guest.directory.path(), |_| {}));
    // The old process ends.
    let mut old = std::mem::replace(&mut guest.driver, next);
    old.run(0);
    drop(old);
    assert!(at_end(&mut client));
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.driver.device().kick_all();
    guest.driver.run(50);
    assert_eq!(guest.driver.take_used(EVENT).map(|used| used.1), Some(4));
    assert_eq!(guest.driver.get(ARENA + 0xf_0000, 4), TRANSPORT_RESET);
    guest.collect();
    assert!(guest.inbox.is_empty(), "the driver has not taken the event yet");
    // It gives the buffer back when it has dropped its connections.
    guest.give_event_buffer();
    let (request, _) = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 5);
    assert!(request.src_port > ports.host, "not a port that the guest may remember");
    // An old connection is unknown.
    guest.send(ports, op::RW);
    assert_eq!(guest.expect(op::RST).0.src_port, ports.host);
    // Only once.
    guest.driver.run(5);
    assert_eq!(guest.driver.take_used(EVENT), None);
}

#[test]
fn the_reset_event_waits_for_a_buffer_but_connections_do_not_wait_for_ever() {
    let mut guest = Guest::ready();
    // Before the hold begins, however long a busy machine takes until then.
    let start = Instant::now();
    let next = guest.driver.migrate(model(guest.directory.path(), |_| {}));
    guest.driver = next;
    guest.driver.device().kick_all();
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.expect(op::REQUEST);
    assert!(start.elapsed() >= RESET_HOLD);
    assert_eq!(guest.driver.take_used(EVENT), None);
    guest.give_event_buffer();
    guest.driver.run(5);
    assert_eq!(guest.driver.take_used(EVENT).map(|used| used.1), Some(4));
}

#[test]
fn a_state_of_another_guest_or_with_an_odd_port_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let good = VsockState { guest_cid: CID, next_host_port: HOST_PORTS.start + 5 };
    let restore = |state: VsockState| model(directory.path(), |_| {}).restore(&DeviceState::Vsock(state));
    assert!(restore(good.clone()).is_ok());
    assert!(restore(VsockState { guest_cid: 8, ..good.clone() }).is_err());
    assert!(restore(VsockState { next_host_port: 5, ..good.clone() }).is_err());
    assert!(restore(VsockState { next_host_port: HOST_PORTS.end, ..good }).is_err());
}
