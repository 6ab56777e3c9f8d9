//! Errors of GPUs in the kernel's log: the NVIDIA driver writes a line with an *Xid* number for
//! each.
//!
//! Source of the numbers: NVIDIA, "XID Errors", the list of those after which a GPU must be reset
//! or replaced.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// 48 double-bit ECC error; 64 row remapping failed; 74 NVLink; 79 fallen off the bus; 95
/// uncontained ECC error; 119 and 120 GSP; 140 unrecovered ECC error.
const FATAL: [u32; 8] = [48, 64, 74, 79, 95, 119, 120, 140];
/// Older ones count no more: whoever had to has reset the GPU since.
const RECENT: Duration = Duration::from_secs(3600);
/// The most records of the log that are read.
const MAX_RECORDS: usize = 1 << 16;
/// `O_NONBLOCK` on Linux: the end of the log is an error then, not a wait.
const NON_BLOCKING: i32 = 0o4000;

/// The Xid of a record of `/dev/kmsg` (`PRIORITY,NUMBER,MICROSECONDS,…;TEXT`), and when it was
/// written, in time since the start of the machine.
fn parse(record: &str) -> Option<(Duration, u32)> {
    let (header, text) = record.split_once(';')?;
    let micros = header.split(',').nth(2)?.parse().ok()?;
    let (_, rest) = text.split_once("NVRM: Xid")?;
    let (_, number) = rest.split_once("): ")?;
    let digits = number.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((Duration::from_micros(micros), digits.parse().ok()?))
}

/// The fatal ones of the last hour; `None` where this process may not read the log.
pub fn recent() -> Option<BTreeSet<u32>> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime = Duration::try_from_secs_f64(uptime.split(' ').next()?.parse().ok()?).ok()?;
    let mut log =
        OpenOptions::new().read(true).custom_flags(NON_BLOCKING).open("/dev/kmsg").ok()?;
    let mut found = BTreeSet::new();
    let mut record = vec![0; 8 << 10];
    for _ in 0..MAX_RECORDS {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(count) => {
                let text = String::from_utf8_lossy(&record[..count]);
                found.extend(parse(&text).and_then(|error| fatal(error, uptime)));
            }
            // It was overwritten meanwhile; the next one is read next.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    Some(found)
}

fn fatal((at, xid): (Duration, u32), uptime: Duration) -> Option<u32> {
    (FATAL.contains(&xid) && at + RECENT >= uptime).then_some(xid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_kernel_are_understood() {
        let record = "4,1093,5140900,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has \
                      fallen off the bus.\n";
        assert_eq!(parse(record), Some((Duration::from_micros(5_140_900), 79)));
        assert_eq!(parse("6,1,2,-;usb 1-1: new device\n"), None);
        assert_eq!(parse("NVRM: Xid (PCI:0000:3b:00): 79"), None);
        assert_eq!(parse("4,1,2,-;NVRM: Xid (PCI:0000:3b:00): , x"), None);
    }

    #[test]
    fn what_is_old_or_mends_itself_does_not_count() {
        let hours = |hours: u64| Duration::from_secs(3600 * hours);
        assert_eq!(fatal((hours(9), 79), hours(10)), Some(79));
        assert_eq!(fatal((hours(8), 79), hours(10)), None);
        assert_eq!(fatal((hours(9), 13), hours(10)), None, "a program's own mistake");
    }
}
