//! The binary `phalanx`.

fn main() {
    std::process::exit(launcher::cli::main());
}
