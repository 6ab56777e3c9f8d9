//! What a rank sends in one operation of the ring algorithms.

use super::Operation;

/// Tensors of at most so many bytes are all-reduced in one hop: to every other rank at once.
pub const SMALL_BYTES: usize = 16 * 1024;

/// Elements that the rank at `position` of `ranks` sends in an operation on a tensor of `elements`
/// (the whole of a gathered or scattered one), each of `width` bytes.
pub(super) fn elements_sent(
    operation: Operation,
    elements: u64,
    width: u64,
    (ranks, position): (usize, usize),
) -> u64 {
    let (ranks, position) = (ranks as u64, position as u64);
    // Pieces are as equal as they can be.
    let piece = |index: u64| elements * (index + 1) / ranks - elements * index / ranks;
    match operation {
        Operation::Send => elements,
        Operation::AllReduce if elements * width <= SMALL_BYTES as u64 => (ranks - 1) * elements,
        // Once round the ring with summands, all pieces but its own, and once with the sums, all
        // but its right neighbour's.
        Operation::AllReduce => 2 * elements - piece(position) - piece((position + 1) % ranks),
        Operation::AllGather | Operation::ReduceScatter => elements / ranks * (ranks - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_ring() {
        let check = |operation, elements, place, expected| {
            assert_eq!(elements_sent(operation, elements, 4, place), expected);
        };
        check(Operation::AllReduce, 8000, (4, 1), 2 * 8000 * 3 / 4);
        check(Operation::AllReduce, 8001, (2, 0), 8001);
        // 8002 in three: 2667, 2667, 2668.
        check(Operation::AllReduce, 8002, (3, 0), 2 * 8002 - 2667 - 2667);
        check(Operation::AllReduce, 8002, (3, 1), 2 * 8002 - 2667 - 2668);
        check(Operation::AllReduce, 4096, (4, 1), 3 * 4096);
        check(Operation::AllReduce, 4097, (4, 0), 2 * 4097 - 1024 - 1024);
        check(Operation::AllGather, 8000, (4, 3), 6000);
        check(Operation::ReduceScatter, 8000, (2, 0), 4000);
        check(Operation::Send, 7, (2, 0), 7);
    }
}
