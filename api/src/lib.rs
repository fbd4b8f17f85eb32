//! The supervisor: REST API, state machine, journal, grants and commits; the command line
