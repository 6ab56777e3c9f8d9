//! Layer 1: NCCL's C interface, and the table of functions that a library is asked for.
//!
//! Source of every layout, code and signature: the public header `nccl.h` of NCCL 2.28.9
//! (wheel nvidia-nccl-cu13 2.28.9, which libtorch 2.11 is built with; the same is in
//! github.com/NVIDIA/nccl, `src/nccl.h.in`).

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null;

use libloading::os::unix::Library;

/// `ncclComm`.
#[repr(C)]
pub(crate) struct RawComm {
    _private: [u8; 0],
}

/// `ncclResult_t`.
pub(crate) type Code = c_int;

/// `ncclSuccess`.
pub(crate) const SUCCESS: Code = 0;
/// `ncclInvalidArgument`: the call had no effect, and the communicator goes on.
pub(crate) const INVALID_ARGUMENT: Code = 4;
/// `ncclInProgress`.
pub(crate) const IN_PROGRESS: Code = 7;
/// `NCCL_SPLIT_NOCOLOR`.
pub(crate) const NO_COLOR: c_int = -1;

/// `ncclUniqueId`; `NCCL_UNIQUE_ID_BYTES` is 128.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawUniqueId {
    pub(crate) internal: [u8; 128],
}

/// `NCCL_CONFIG_UNDEF_INT`.
const UNDEFINED: c_int = c_int::MIN;
/// What `NCCL_CONFIG_INITIALIZER` puts into `magic`.
const MAGIC: c_uint = 0xcafe_beef;
/// The version whose layout [`Config`] has: `NCCL_VERSION(2, 28, 9)`. A library reads as many bytes
/// as it and `size` know, and takes its defaults for fields that are younger than `version`.
const LAYOUT_VERSION: c_uint = 22_809;

/// `ncclConfig_t`, named `ncclConfig_v22800` in the header.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    n_channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`: no call waits, so that an abort can come
    /// between any two.
    pub(crate) fn non_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: LAYOUT_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            n_channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

/// Declares the table of functions, and how it is filled.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of a loaded library.
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Looks all functions up; the error is the name of the first that is missing.
            ///
            /// # Safety
            /// The library is NCCL, and stays loaded as long as the functions are called.
            pub(crate) unsafe fn find(library: &Library) -> Result<Functions, &'static str> {
                Ok(Functions {
                    // SAFETY: the types are those of the public header.
                    $($field: *unsafe { library.get($symbol) }.map_err(|_| $symbol)?,)*
                })
            }
        }

        /// The symbols that are looked up.
        #[cfg(test)]
        pub(crate) const SYMBOLS: &[&str] = &[$($symbol),*];
    };
}

/// `ncclGetVersion`, which is asked before the others are looked up.
pub(crate) const GET_VERSION: &str = "ncclGetVersion";
/// Its type.
pub(crate) type GetVersion = unsafe extern "C" fn(*mut c_int) -> Code;

functions! {
    get_unique_id = "ncclGetUniqueId": fn(*mut RawUniqueId) -> Code;
    get_error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
    get_last_error = "ncclGetLastError": fn(*mut RawComm) -> *const c_char;
    comm_init_rank_config = "ncclCommInitRankConfig":
        fn(*mut *mut RawComm, c_int, RawUniqueId, c_int, *mut Config) -> Code;
    comm_split = "ncclCommSplit":
        fn(*mut RawComm, c_int, c_int, *mut *mut RawComm, *mut Config) -> Code;
    comm_get_async_error = "ncclCommGetAsyncError": fn(*mut RawComm, *mut Code) -> Code;
    comm_count = "ncclCommCount": fn(*mut RawComm, *mut c_int) -> Code;
    comm_user_rank = "ncclCommUserRank": fn(*mut RawComm, *mut c_int) -> Code;
    comm_finalize = "ncclCommFinalize": fn(*mut RawComm) -> Code;
    comm_destroy = "ncclCommDestroy": fn(*mut RawComm) -> Code;
    comm_abort = "ncclCommAbort": fn(*mut RawComm) -> Code;
    all_reduce = "ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut RawComm, *mut c_void) -> Code;
    all_gather = "ncclAllGather":
        fn(*const c_void, *mut c_void, usize, c_int, *mut RawComm, *mut c_void) -> Code;
    reduce_scatter = "ncclReduceScatter":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut RawComm, *mut c_void) -> Code;
    broadcast = "ncclBroadcast":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut RawComm, *mut c_void) -> Code;
    send = "ncclSend":
        fn(*const c_void, usize, c_int, c_int, *mut RawComm, *mut c_void) -> Code;
    recv = "ncclRecv":
        fn(*mut c_void, usize, c_int, c_int, *mut RawComm, *mut c_void) -> Code;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The offsets that a C compiler gives the header's fields on x86-64 and aarch64.
    #[test]
    fn the_config_lies_as_in_the_header() {
        let expected = [
            ("size", offset_of!(Config, size), 0),
            ("magic", offset_of!(Config, magic), 8),
            ("version", offset_of!(Config, version), 12),
            ("blocking", offset_of!(Config, blocking), 16),
            ("cgaClusterSize", offset_of!(Config, cga_cluster_size), 20),
            ("minCTAs", offset_of!(Config, min_ctas), 24),
            ("maxCTAs", offset_of!(Config, max_ctas), 28),
            ("netName", offset_of!(Config, net_name), 32),
            ("splitShare", offset_of!(Config, split_share), 40),
            ("trafficClass", offset_of!(Config, traffic_class), 44),
            ("commName", offset_of!(Config, comm_name), 48),
            ("collnetEnable", offset_of!(Config, collnet_enable), 56),
            ("CTAPolicy", offset_of!(Config, cta_policy), 60),
            ("shrinkShare", offset_of!(Config, shrink_share), 64),
            ("nvlsCTAs", offset_of!(Config, nvls_ctas), 68),
            ("nChannelsPerNetPeer", offset_of!(Config, n_channels_per_net_peer), 72),
            ("nvlinkCentricSched", offset_of!(Config, nvlink_centric_sched), 76),
        ];
        for (field, found, offset) in expected {
            assert_eq!(found, offset, "{field}");
        }
        assert_eq!((size_of::<Config>(), align_of::<Config>()), (80, 8));
        assert_eq!((size_of::<RawUniqueId>(), align_of::<RawUniqueId>()), (128, 1));
    }

    #[test]
    fn the_config_is_the_headers_initializer_but_for_blocking() {
        let config = Config::non_blocking();
        let undefined = i32::MIN;
        assert_eq!((config.size, config.magic, config.version), (80, 0xcafe_beef, 22_809));
        assert_eq!(config.blocking, 0);
        assert!(config.net_name.is_null() && config.comm_name.is_null());
        for value in [
            config.cga_cluster_size,
            config.min_ctas,
            config.max_ctas,
            config.split_share,
            config.traffic_class,
            config.collnet_enable,
            config.cta_policy,
            config.shrink_share,
            config.nvls_ctas,
            config.n_channels_per_net_peer,
            config.nvlink_centric_sched,
        ] {
            assert_eq!(value, undefined);
        }
    }

    #[test]
    fn every_symbol_is_asked_for_once() {
        let mut symbols = [SYMBOLS, &[GET_VERSION]].concat();
        let num_asked = symbols.len();
        symbols.sort_unstable();
        symbols.dedup();
        assert_eq!((symbols.len(), num_asked), (20, 20));
        assert!(symbols.iter().all(|symbol| symbol.starts_with("nccl")));
    }
}
