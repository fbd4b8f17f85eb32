//! `stasis-unpack`: the unpacker as a process. It is started by the supervisor with descriptors (`--fd=NAME=NUMBER`) and by nobody else.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::process::ExitCode;

use stasis_unpack::protocol::names;
use stasis_unpack::serve::{Inherited, run};
use stasis_unpack::{chain, confine};

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the unpacker cannot go on: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<(), Box<dyn Error>> {
    let mut given = BTreeMap::new();
    for argument in std::env::args().skip(1) {
        let named = argument.strip_prefix("--fd=").and_then(|rest| rest.split_once('='));
        let (name, number) = named.ok_or_else(|| format!("{argument:?} is not --fd=NAME=NUMBER"))?;
        let number: RawFd = number.parse()?;
        if number <= 2 || given.insert(name.to_owned(), number).is_some() {
            return Err(format!("{argument:?} names a descriptor that is another's").into());
        }
    }
    let mut take = |name: &str| -> Result<File, Box<dyn Error>> {
        let number = given.remove(name).ok_or_else(|| format!("no descriptor was given for {name}"))?;
        // SAFETY: whoever starts this process gives it this one, each number once, and nothing else here has touched it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(number) }))
    };
    let (control, input, disk) = (take(names::CONTROL)?, take(names::INPUT)?, take(names::DISK)?);
    let octets = disk.metadata()?.len();
    confine::limit(octets)?;
    confine::filter_calls()?;
    Ok(run(Inherited { control, input, disk, octets })?)
}
