//! Device models: serial, virtio-mmio, block, vsock, rng, VM generation id
