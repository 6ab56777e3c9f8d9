//! Outputs that may go away, as in `phalanx status | head -1` or `phalanx run … 2>&1 | head -1`.

use rank_protocol::exit_code;
use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

/// Prints a line. Unlike `println!` it does not panic where nobody listens any more.
macro_rules! out {
    ($($arg:tt)*) => { $crate::print::line(format_args!($($arg)*)) };
}
pub(crate) use out;

/// Prints a line on standard error. Unlike `eprintln!` it does not panic where nobody listens any
/// more: what goes on does not end for want of a listener.
macro_rules! err {
    ($($arg:tt)*) => { $crate::print::error_line(format_args!($($arg)*)) };
}
pub(crate) use err;

/// Prints a line; ends the process where nobody listens any more.
pub fn line(text: Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{text}") {
        if error.kind() == ErrorKind::BrokenPipe {
            std::process::exit(exit_code::DONE);
        }
        err!("error: cannot write to standard output: {error}");
        std::process::exit(exit_code::FAILED);
    }
}

/// Prints a line on standard error, or nowhere.
pub fn error_line(text: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
