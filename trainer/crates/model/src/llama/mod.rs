//! The Llama 3 family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

pub mod attention;
pub mod block;
pub mod feed_forward;
pub mod init;
pub mod model;
pub mod rope;

pub use model::{Llama, Stage};
