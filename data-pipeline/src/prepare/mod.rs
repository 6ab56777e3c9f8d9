//! Text to shards.
