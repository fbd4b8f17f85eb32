//! Features, resets, restores and the announcement.

use super::super::super::{RestoreError, VirtioDevice};
use super::super::{DeviceState, NetState};
use super::*;

const UP: u16 = 1;
const UP_ANNOUNCE: u16 = 3;

/// The device of another process, on the same guest memory; answers the old host's end.
fn migrate(guest: &mut Guest, config: NetConfig) -> UnixDatagram {
    let (net, host) = model(config, &guest.clock);
    guest.counters = net.counters();
    guest.driver = guest.driver.migrate(net);
    std::mem::replace(&mut guest.host, host)
}

#[test]
fn the_configuration_space_says_address_link_and_mtu() {
    let guest = Guest::new(ALL);
    let mut space = [0xff; 14];
    guest.driver.device().read(0x100, &mut space);
    assert_eq!(space, [2, 0x53, 0x54, 0x41, 0x53, 2, 1, 0, 0, 0, 0xdc, 5, 0, 0]);
    let no_link = Driver::new(Net::new(config(), None).unwrap());
    no_link.device().read(0x100, &mut space);
    assert_eq!(space[6], 0);
}

#[test]
fn nothing_of_ipv6_is_offered() {
    let guest = Guest::new(ALL);
    let six = [
        b::VIRTIO_NET_F_GUEST_TSO6,
        b::VIRTIO_NET_F_HOST_TSO6,
        b::VIRTIO_NET_F_GUEST_USO6,
        b::VIRTIO_NET_F_HOST_USO,
        b::VIRTIO_NET_F_GUEST_UFO,
    ];
    assert_eq!(guest.driver.offered() & six.iter().fold(0, |set, feature| set | 1_u64 << feature), 0);
}

#[test]
fn without_a_tap_what_is_sent_is_dropped() {
    let net = Net::new(config(), None).unwrap();
    let counters = net.counters();
    let mut driver = Driver::new(net);
    driver.start(16, ALL);
    driver.put(TX_ARENA, &[0; 100]);
    driver.add(TRANSMIT, &[readable(TX_ARENA, 100)]);
    driver.notify(TRANSMIT);
    driver.add(RECEIVE, &[writable(RX_ARENA, 2000)]);
    driver.notify(RECEIVE);
    driver.run(0);
    assert_eq!((driver.used_index(TRANSMIT), driver.used_index(RECEIVE)), (1, 0));
    assert_eq!(counters.from_guest.dropped(), 1);
}

#[test]
fn a_restored_guest_announces_itself_once() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.status(), UP);
    migrate(&mut guest, config());
    let before = guest.driver.read(0xfc);
    guest.driver.device().kick_all();
    assert_eq!(guest.driver.take_interrupt(), 3, "a configuration change, and the kick");
    assert_eq!(guest.driver.read(0xfc), before + 1, "another generation of the configuration space");
    assert_eq!(guest.status(), UP_ANNOUNCE);
    assert_eq!(guest.command(3, 0), Some(0));
    assert_eq!(guest.status(), UP);
    // A pause and resume of the same process moves nothing.
    guest.driver.device().kick_all();
    assert_eq!(guest.status(), UP);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked_to() {
    let mut guest = Guest::new(ALL & !ANNOUNCE);
    migrate(&mut guest, config());
    guest.driver.device().kick_all();
    assert_eq!(guest.status(), UP);
    assert_eq!(guest.command(3, 0), Some(1));
}

#[test]
fn commands_that_are_not_known_are_refused() {
    let mut guest = Guest::new(ALL);
    for (class, command) in [(0, 0), (1, 0), (3, 1), (4, 0), (0xff, 0xff)] {
        assert_eq!(guest.command(class, command), Some(1));
    }
}

#[test]
fn traffic_goes_on_after_a_restore_on_the_new_tap() {
    let mut guest = Guest::new(ALL);
    (0..20).for_each(|_| guest.give(&[1000]));
    guest.arrives(Header::default(), &frame(700, 1));
    guest.run_receive();
    // One that nobody has read yet is the old tap's.
    guest.arrives(Header::default(), &frame(700, 2));
    assert!(guest.send(Header::default(), &frame(800, 3), 4096), "available, and not looked at yet");
    let old = migrate(&mut guest, config());
    guest.driver.device().kick_all();
    guest.arrives(Header::default(), &frame(700, 4));
    guest.driver.run(0);
    guest.collect();
    let received: Vec<_> = guest.inbox.drain(..).map(|(_, frame)| frame).collect();
    assert_eq!(received, [frame(700, 1), frame(700, 4)]);
    assert_eq!(guest.arrived().map(|(_, frame)| frame), Some(frame(800, 3)));
    assert!(old.recv(&mut [0; 10]).is_err());
}

#[test]
fn a_frame_that_is_held_is_in_no_snapshot() {
    let mut guest = Guest::new(ALL);
    (0..3).for_each(|_| guest.give(&[1000]));
    guest.arrives(Header::default(), &frame(5000, 1));
    guest.run_receive();
    assert_eq!(guest.driver.used_index(RECEIVE), 0);
    migrate(&mut guest, config());
    guest.driver.device().kick_all();
    (0..20).for_each(|_| guest.give(&[1000]));
    guest.arrives(Header::default(), &frame(2500, 2));
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(2500, 2)));
    assert_eq!(guest.take(), None);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_reset_during_traffic_forgets_the_rings_and_what_is_held() {
    let mut guest = Guest::new(ALL);
    guest.give(&[1000]);
    guest.arrives(Header::default(), &frame(5000, 1));
    guest.run_receive();
    guest.driver.write(0x70, 0);
    assert_eq!(guest.counters.to_guest.dropped(), 1);
    guest.arrives(Header::default(), &frame(100, 2));
    guest.driver.run(0);
    guest.driver.start(64, ALL);
    guest.rx.clear();
    guest.give(&[1000]);
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(100, 2)));
}

#[test]
fn a_state_of_another_device_is_refused() {
    let mut net = Net::new(config(), None).unwrap();
    let DeviceState::Net(state) = net.save() else { panic!("another device's state") };
    for bad in [NetState { mtu: 9000, ..state.clone() }, NetState { mac: [4; 6], ..state }] {
        assert!(matches!(net.restore(&DeviceState::Net(bad)), Err(RestoreError::Mismatch { .. })));
    }
    let other = super::super::super::rng::RngState {};
    assert!(matches!(net.restore(&DeviceState::Rng(other)), Err(RestoreError::Foreign)));
}
