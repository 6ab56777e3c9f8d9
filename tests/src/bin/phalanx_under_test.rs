//! `phalanx` as users have it, built with the tests so that they find it beside themselves.

fn main() {
    std::process::exit(launcher::cli::main());
}
