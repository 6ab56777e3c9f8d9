//! Shows which NCCL a machine has, and whether one rank can connect to itself:
//! `cargo run -p nccl-rs --example inspect -- [PATH] [LIBTORCH_LIB]`.

use std::process::ExitCode;

use nccl_rs::{Communicator, Nccl, NcclError, Options, Search};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(Into::into);
    let (path, libtorch_lib) = (arguments.next(), arguments.next());
    match inspect(&Search { path, libtorch_lib, ..Search::default() }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn inspect(search: &Search) -> Result<(), NcclError> {
    let nccl = Nccl::load(search)?;
    println!("{nccl:?} has every function");
    let id = nccl.unique_id()?;
    println!("made an id");
    let communicator = Communicator::connect(&nccl, id, 0, 1, Options::new("inspect"))?;
    println!("connected as rank {} of {}", communicator.rank(), communicator.size());
    communicator.finish()?;
    println!("finished");
    Ok(())
}
