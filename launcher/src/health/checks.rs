//! The checks of what every machine has. `is_faulty` plants the fault that each must find, for
//! tests.

use super::{Depth, Found, LIMIT};
use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Rows and columns of the product.
const SIDE: usize = 64;
/// Time for which each core multiplies.
const COMPUTE_TIME: Duration = Duration::from_millis(5);
const QUICK_MEMORY_BYTES: usize = 4 << 20;
const FULL_MEMORY_BYTES: usize = 64 << 20;
const DISK_BYTES: usize = 256 << 10;
/// Free space without which no checkpoint can be hoped for.
const LEAST_FREE_BYTES: u64 = 64 << 20;
const LINK_BYTES: usize = 1 << 20;
/// 2^64 over the golden ratio: consecutive multiples have few bits in common.
const PATTERN: u64 = 0x9e37_79b9_7f4a_7c15;

fn small(row: usize, column: usize, seed: usize) -> i32 {
    ((row * 7 + column * 13 + seed) % 17) as i32 - 8
}

/// Multiplies matrices of small whole numbers, whose product FP32 and FP64 hold exactly, and
/// compares every bit with the product of integers.
fn product_is_right(seed: usize, is_faulty: bool) -> bool {
    let seed = black_box(seed);
    (0..SIDE).all(|row| {
        (0..SIDE).all(|column| {
            let (mut exact, mut single, mut double) = (0_i32, 0_f32, 0_f64);
            for inner in 0..SIDE {
                let (a, b) = (small(row, inner, seed), small(inner, column, seed + 1));
                exact += a * b;
                single = (a as f32).mul_add(b as f32, single);
                double += f64::from(a) * f64::from(b);
            }
            let flipped = u32::from(is_faulty && row == SIDE - 1 && column == 0);
            single.to_bits() ^ flipped == (exact as f32).to_bits()
                && double.to_bits() == f64::from(exact).to_bits()
        })
    })
}

/// Every core, as many as this process may use.
pub fn compute(is_faulty: bool) -> Found {
    let cores = crate::machine::num_cores();
    let core = |seed: usize| {
        let begun = Instant::now();
        let mut num_products = 0;
        while num_products == 0 || begun.elapsed() < COMPUTE_TIME {
            if !product_is_right(seed + num_products, is_faulty && seed == 0) {
                return Err("a product of whole numbers has wrong bits".to_owned());
            }
            num_products += 1;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3 / num_products as f64)
    };
    let times: Result<Vec<f64>, String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|seed| scope.spawn(move || core(seed))).collect();
        let gone = || Err("a thread is gone".to_owned());
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| gone())).collect()
    });
    let slowest = times?.into_iter().fold(0.0, f64::max);
    Ok(format!("{cores} cores, at most {slowest:.2} ms a product"))
}

/// Writes a pattern and then its opposite, and reads both back.
pub fn memory(depth: Depth, is_faulty: bool) -> Found {
    let bytes = match depth {
        Depth::Quick => QUICK_MEMORY_BYTES,
        Depth::Full => FULL_MEMORY_BYTES,
    };
    let words = bytes / size_of::<u64>();
    let mib = bytes >> 20;
    let mut memory: Vec<u64> = Vec::new();
    memory.try_reserve_exact(words).map_err(|error| format!("no {mib} MiB: {error}"))?;
    memory.resize(words, 0);
    let begun = Instant::now();
    for flip in [0, u64::MAX] {
        let expected = |index: usize| (index as u64).wrapping_mul(PATTERN) ^ flip;
        for (index, word) in memory.iter_mut().enumerate() {
            *word = expected(index);
        }
        if is_faulty && flip != 0 {
            memory[words / 2] ^= 1 << 40;
        }
        let kept = black_box(&memory);
        if let Some(bad) = (0..words).find(|index| kept[*index] != expected(*index)) {
            let wrong = kept[bad] ^ expected(bad);
            return Err(format!("of {mib} MiB, word {bad} has wrong bits: {wrong:#018x}"));
        }
    }
    let speed = 4.0 * bytes as f64 / 1e9 / begun.elapsed().as_secs_f64();
    Ok(format!("{mib} MiB, {speed:.1} GB/s"))
}

/// Writes a file, has it on the disk, and reads it back (from memory, where the system kept it).
pub fn disk(dir: &Path, is_faulty: bool) -> Found {
    let wrong =
        |what: &str, error: &dyn std::fmt::Display| format!("{what} in {}: {error}", dir.display());
    let space = rustix::fs::statvfs(dir).map_err(|error| wrong("free space", &error))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free < LEAST_FREE_BYTES {
        let (free, least) = (free >> 20, LEAST_FREE_BYTES >> 20);
        return Err(format!("{free} MiB are free in {}, the least is {least}", dir.display()));
    }
    let host = crate::cluster::nodes::host_name();
    let path = dir.join(format!(".health-{host}-{}", std::process::id()));
    let found = write_and_read(&path, is_faulty).map_err(|error| wrong("a file", &error));
    let _ = std::fs::remove_file(&path);
    let milliseconds = found??;
    Ok(format!("{milliseconds:.1} ms to the disk, {} GiB free", free >> 30))
}

fn write_and_read(path: &Path, is_faulty: bool) -> std::io::Result<Result<f64, String>> {
    let written: Vec<u8> =
        (0..DISK_BYTES as u64).map(|index| index.wrapping_mul(PATTERN).to_le_bytes()[7]).collect();
    let begun = Instant::now();
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&written)?;
    file.sync_all()?;
    let milliseconds = begun.elapsed().as_secs_f64() * 1e3;
    drop(file);
    if is_faulty {
        let mut damaged = written.clone();
        damaged[DISK_BYTES / 2] ^= 1;
        std::fs::write(path, damaged)?;
    }
    let mut read = Vec::with_capacity(DISK_BYTES);
    File::open(path)?.take(2 * DISK_BYTES as u64).read_to_end(&mut read)?;
    if read != written {
        let at = read.iter().zip(&written).take_while(|(a, b)| a == b).count();
        return Ok(Err(format!("what was written differs from byte {at} on")));
    }
    Ok(Ok(milliseconds))
}

/// Sends bytes to itself over the loopback. That says nothing of cables, which show when an agent
/// connects; of the network below them it does.
pub fn link(is_faulty: bool) -> Found {
    let wrong = |error: std::io::Error| format!("over the loopback: {error}");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    let echo = std::thread::spawn(move || echo(&listener, is_faulty));
    let found = (|| -> std::io::Result<(f64, f64, bool)> {
        let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        let mut one = [7];
        let begun = Instant::now();
        stream.write_all(&one)?;
        stream.read_exact(&mut one)?;
        let round_trip = begun.elapsed();
        let sent: Vec<u8> = (0..LINK_BYTES as u64)
            .map(|index| index.wrapping_mul(PATTERN).to_le_bytes()[7])
            .collect();
        let mut writer = stream.try_clone()?;
        let begun = Instant::now();
        let mut received = vec![0; LINK_BYTES];
        std::thread::scope(|scope| {
            let written = scope.spawn(|| writer.write_all(&sent));
            let read = stream.read_exact(&mut received);
            let written = written.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
            read.and(written)
        })?;
        let speed = 2.0 * LINK_BYTES as f64 / 1e9 / begun.elapsed().as_secs_f64();
        Ok((round_trip.as_secs_f64() * 1e3, speed, received == sent))
    })();
    let (round_trip, speed, is_same) = found.map_err(wrong)?;
    drop(echo);
    match is_same {
        true => Ok(format!("{round_trip:.2} ms there and back, {speed:.1} GB/s")),
        false => Err("over the loopback: what came back differs from what was sent".to_owned()),
    }
}

fn echo(listener: &TcpListener, is_faulty: bool) -> std::io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    let mut left = 1 + LINK_BYTES;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        if is_faulty && left <= LINK_BYTES {
            buffer[0] ^= 1;
        }
        stream.write_all(&buffer[..count])?;
        left = left.saturating_sub(count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_found(found: Found, expected: &str) {
        let problem = found.unwrap_err();
        assert!(problem.contains(expected), "{problem:?} lacks {expected:?}");
    }

    #[test]
    fn each_planted_fault_is_found() {
        let folder = tempfile::tempdir().unwrap();
        check_found(compute(true), "wrong bits");
        check_found(memory(Depth::Quick, true), "wrong bits: 0x0000010000000000");
        check_found(disk(folder.path(), true), "differs from byte 131072 on");
        check_found(link(true), "differs from what was sent");
        check_found(disk(&folder.path().join("absent"), false), "No such file");
    }
}
