//! `phalanx-trainer`: the program that every rank runs, and what else needs libtorch.

use clap::{Parser, Subcommand};
use rank_protocol::exit_code;
use std::io::Write;
use trainer::error::TrainError;
use trainer::{backend, bench, generate, kernel_check, rank};

#[derive(Parser)]
#[command(name = "phalanx-trainer", version, about = "The part of Phalanx that needs libtorch")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Be a rank; started by `phalanx run`.
    Rank,
    /// Print what can carry the messages between ranks, one a line.
    Backends,
    /// Let a trained model write.
    Generate(generate::GenerateArgs),
    /// Compare what this device computes with the same in FP64 on the CPU, a line of JSON each.
    Kernels(kernel_check::KernelArgs),
    /// Measure.
    Bench {
        /// What.
        #[command(subcommand)]
        what: Bench,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// Training steps of one process.
    Train(bench::BenchArgs),
    /// What the device can do at best.
    Device(bench::DeviceArgs),
}

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let code = if error.use_stderr() { exit_code::CONFIG } else { exit_code::DONE };
        let _ = error.print();
        std::process::exit(code)
    });
    let told = |result: Result<(), TrainError>| match result {
        Ok(()) => exit_code::DONE,
        Err(error) => {
            let text = error.lines().join("\n  because: ");
            let _ = writeln!(std::io::stderr(), "{text}");
            error.exit_code()
        }
    };
    let code = match cli.verb {
        Verb::Rank => rank::run(),
        Verb::Backends => {
            println!("{}", backend::BUILT.join("\n"));
            exit_code::DONE
        }
        Verb::Generate(args) => told(generate::run(&args)),
        Verb::Kernels(args) => told(kernel_check::run(&args)),
        Verb::Bench { what: Bench::Train(args) } => told(bench::run_train(&args)),
        Verb::Bench { what: Bench::Device(args) } => told(bench::run_device(&args)),
    };
    std::process::exit(code)
}
