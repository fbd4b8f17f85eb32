//! The program `stasis`. Everything is in the library, where it can be tested.

fn main() -> std::process::ExitCode {
    stasis_api::cli::main()
}
