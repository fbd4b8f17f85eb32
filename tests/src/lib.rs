//! End-to-end tests, the nested-host rig and what they share
