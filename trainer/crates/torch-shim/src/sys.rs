//! Layer 1: the shim's C functions as they are. Each returns null, or an error's text that
//! `phx_free` frees.

use std::ffi::{c_char, c_void};

/// `at::Tensor*`, as tch has it.
pub(crate) type RawTensor = *mut torch_sys::C_tensor;
/// A Rust closure over tensors, as C++ calls it.
pub(crate) type Call = unsafe extern "C" fn(
    *mut c_void,
    *const RawTensor,
    usize,
    *mut RawTensor,
    usize,
) -> *mut c_char;
/// A Rust closure over a parameter's index.
pub(crate) type Ready = unsafe extern "C" fn(*mut c_void, usize) -> *mut c_char;
/// Drops a closure's context.
pub(crate) type DropContext = unsafe extern "C" fn(*mut c_void);
/// An error's text, or null.
pub(crate) type ErrorText = *mut c_char;

/// `phalanx::ReadyHook`.
#[repr(C)]
pub(crate) struct RawHook {
    _private: [u8; 0],
}

/// A shared pointer to a meter.
#[repr(C)]
pub(crate) struct RawMeter {
    _private: [u8; 0],
}

/// `phalanx::Parameter`.
#[repr(C)]
pub(crate) struct RawParameter {
    _private: [u8; 0],
}

/// `phalanx::Deferred`.
#[repr(C)]
pub(crate) struct RawDeferred {
    _private: [u8; 0],
}

/// `phalanx::Use`.
#[repr(C)]
pub(crate) struct RawUse {
    _private: [u8; 0],
}

/// `phx_gloo`.
#[repr(C)]
pub(crate) struct RawGloo {
    _private: [u8; 0],
}

/// `c10::Stream`.
#[repr(C)]
pub(crate) struct RawStream {
    _private: [u8; 0],
}

/// `c10::Event`.
#[repr(C)]
pub(crate) struct RawEvent {
    _private: [u8; 0],
}

/// `Range` of profiler.cpp.
#[repr(C)]
pub(crate) struct RawRange {
    _private: [u8; 0],
}

/// `phx_card`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawCard {
    pub(crate) name: [c_char; 128],
    pub(crate) major: i32,
    pub(crate) minor: i32,
    pub(crate) bytes: u64,
}

/// `Message` of gloo.cpp.
#[repr(C)]
pub(crate) struct RawMessage {
    _private: [u8; 0],
}

/// Takes over a copy of a value.
pub(crate) type Push = unsafe extern "C" fn(*mut c_void, *const u8, usize);

/// `phx_store_calls`.
#[repr(C)]
pub(crate) struct StoreCalls {
    pub(crate) set: unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize) -> ErrorText,
    pub(crate) get:
        unsafe extern "C" fn(*mut c_void, *const c_char, i64, *mut c_void, Push) -> ErrorText,
    pub(crate) add: unsafe extern "C" fn(*mut c_void, *const c_char, i64, *mut i64) -> ErrorText,
    pub(crate) wait:
        unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, i64) -> ErrorText,
    pub(crate) check:
        unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, *mut bool) -> ErrorText,
    pub(crate) remove: unsafe extern "C" fn(*mut c_void, *const c_char, *mut bool) -> ErrorText,
    pub(crate) drop: DropContext,
}

unsafe extern "C" {
    pub(crate) fn phx_meter_new(out: *mut *mut RawMeter) -> ErrorText;
    pub(crate) fn phx_meter_count(meter: *mut RawMeter);
    pub(crate) fn phx_meter_read(meter: *mut RawMeter, now: *mut i64, peak: *mut i64);
    pub(crate) fn phx_meter_free(meter: *mut RawMeter);
    pub(crate) fn phx_normals(key: u64, first: u64, pairs: i64, std: f64, out: *mut f32);
    pub(crate) fn phx_keep_cpu_memory(limit: usize) -> ErrorText;
    pub(crate) fn phx_zero_bytes(count: i64, out: *mut RawTensor) -> ErrorText;

    pub(crate) fn phx_cuda_load(runtime: *mut i32) -> ErrorText;
    pub(crate) fn phx_cuda_start(devices: *mut i32) -> ErrorText;
    pub(crate) fn phx_cuda_allocator(settings: *const c_char) -> ErrorText;
    pub(crate) fn phx_cuda_probe(index: i32) -> ErrorText;
    pub(crate) fn phx_cuda_memory(index: i32, out: *mut i64) -> ErrorText;
    pub(crate) fn phx_cuda_reset_peaks(index: i32) -> ErrorText;
    pub(crate) fn phx_driver_look(
        path: *const c_char,
        code: *mut i32,
        version: *mut i32,
        cards: *mut RawCard,
        room: usize,
        count: *mut usize,
    ) -> ErrorText;
    pub(crate) fn phx_upload(host: RawTensor, index: i32, out: *mut RawTensor) -> ErrorText;
    pub(crate) fn phx_download(tensor: RawTensor, out: *mut RawTensor) -> ErrorText;
    pub(crate) fn phx_cuda_set_device(index: i32) -> ErrorText;
    pub(crate) fn phx_cuda_synchronize(index: i32) -> ErrorText;
    pub(crate) fn phx_stream_take(index: i32, out: *mut *mut RawStream) -> ErrorText;
    pub(crate) fn phx_stream_free(stream: *mut RawStream);
    pub(crate) fn phx_stream_native(stream: *const RawStream, out: *mut *mut c_void) -> ErrorText;
    pub(crate) fn phx_stream_current(index: i32, out: *mut *mut c_void) -> ErrorText;
    pub(crate) fn phx_stream_id(stream: *const RawStream) -> i64;
    pub(crate) fn phx_stream_exchange(
        stream: *const RawStream,
        out: *mut *mut RawStream,
    ) -> ErrorText;
    pub(crate) fn phx_event_on_current(
        index: i32,
        timed: bool,
        out: *mut *mut RawEvent,
    ) -> ErrorText;
    pub(crate) fn phx_event_on(
        stream: *const RawStream,
        timed: bool,
        out: *mut *mut RawEvent,
    ) -> ErrorText;
    pub(crate) fn phx_event_wait(event: *const RawEvent) -> ErrorText;
    pub(crate) fn phx_event_elapsed(
        from: *const RawEvent,
        to: *const RawEvent,
        out: *mut f64,
    ) -> ErrorText;
    pub(crate) fn phx_event_free(event: *mut RawEvent);
    pub(crate) fn phx_event_hold_current(event: *const RawEvent) -> ErrorText;
    pub(crate) fn phx_event_hold(event: *const RawEvent, stream: *const RawStream) -> ErrorText;
    pub(crate) fn phx_event_is_past(event: *const RawEvent, out: *mut bool) -> ErrorText;
    pub(crate) fn phx_tensor_record_stream(
        tensor: RawTensor,
        stream: *const RawStream,
    ) -> ErrorText;

    pub(crate) fn phx_flash_forward(
        kernel: i32,
        q: RawTensor,
        k: RawTensor,
        v: RawTensor,
        starts: RawTensor,
        longest: i64,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_flash_backward(
        kernel: i32,
        d_out: RawTensor,
        q: RawTensor,
        k: RawTensor,
        v: RawTensor,
        kept: *const RawTensor,
        starts: RawTensor,
        longest: i64,
        out: *mut RawTensor,
    ) -> ErrorText;

    pub(crate) fn phx_profiler_start(cuda: bool) -> ErrorText;
    pub(crate) fn phx_profiler_stop(path: *const c_char) -> ErrorText;
    pub(crate) fn phx_range_begin(name: *const c_char, out: *mut *mut RawRange) -> ErrorText;
    pub(crate) fn phx_range_end(range: *mut RawRange);

    pub(crate) fn phx_combine(accumulator: RawTensor, x: RawTensor, how: i32) -> ErrorText;
    pub(crate) fn phx_divide(x: RawTensor, divisor: f64) -> ErrorText;
    pub(crate) fn phx_copy(to: RawTensor, from: RawTensor) -> ErrorText;

    pub(crate) fn phx_gloo_new(
        context: *mut c_void,
        calls: *const StoreCalls,
        rank: i32,
        size: i32,
        timeout_ms: i64,
        hostname: *const c_char,
        out: *mut *mut RawGloo,
    ) -> ErrorText;
    pub(crate) fn phx_gloo_free(gloo: *mut RawGloo);
    pub(crate) fn phx_gloo_send(
        gloo: *mut RawGloo,
        tensor: RawTensor,
        peer: i32,
        tag: i32,
        out: *mut *mut RawMessage,
    ) -> ErrorText;
    pub(crate) fn phx_gloo_recv(
        gloo: *mut RawGloo,
        tensor: RawTensor,
        peer: i32,
        tag: i32,
        out: *mut *mut RawMessage,
    ) -> ErrorText;
    pub(crate) fn phx_message_wait(message: *mut RawMessage, timeout_ms: i64) -> ErrorText;
    pub(crate) fn phx_message_abort(message: *mut RawMessage) -> ErrorText;
    pub(crate) fn phx_message_free(message: *mut RawMessage);

    pub(crate) fn strdup(text: *const c_char) -> *mut c_char;
    pub(crate) fn phx_free(pointer: *mut c_void);

    pub(crate) fn phx_apply(
        inputs: *const RawTensor,
        num_in: usize,
        outputs: *mut RawTensor,
        num_out: usize,
        num_saved: usize,
        forward_context: *mut c_void,
        forward: Call,
        backward_context: *mut c_void,
        backward: Call,
        drop: DropContext,
    ) -> ErrorText;
    pub(crate) fn phx_written(tensor: RawTensor) -> ErrorText;
    pub(crate) fn phx_post_accumulate_hook(
        tensor: RawTensor,
        context: *mut c_void,
        call: Call,
        drop: DropContext,
    ) -> ErrorText;
    pub(crate) fn phx_gradient_hook(
        tensor: RawTensor,
        context: *mut c_void,
        call: Call,
        drop: DropContext,
    ) -> ErrorText;
    pub(crate) fn phx_backward(
        outputs: *const RawTensor,
        given: *const RawTensor,
        num_out: usize,
        inputs: *const RawTensor,
        num_in: usize,
        gradients: *mut RawTensor,
        keep_graph: bool,
    ) -> ErrorText;

    pub(crate) fn phx_fused_adamw(
        parameters: *const RawTensor,
        gradients: *const RawTensor,
        first_moments: *const RawTensor,
        second_moments: *const RawTensor,
        count: usize,
        step: RawTensor,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        divisor: RawTensor,
        held: RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_global_norm(
        list: *const RawTensor,
        count: usize,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_foreach_mul(list: *const RawTensor, count: usize, factor: f64) -> ErrorText;
    pub(crate) fn phx_foreach_mul_tensor(
        list: *const RawTensor,
        count: usize,
        factor: RawTensor,
    ) -> ErrorText;

    pub(crate) fn phx_hook_new(out: *mut *mut RawHook) -> ErrorText;
    pub(crate) fn phx_hook_set(
        hook: *mut RawHook,
        context: *mut c_void,
        function: Ready,
        drop: DropContext,
    ) -> ErrorText;
    pub(crate) fn phx_hook_clear(hook: *mut RawHook) -> ErrorText;
    pub(crate) fn phx_hook_free(hook: *mut RawHook);
    pub(crate) fn phx_parameter_new(
        weight: RawTensor,
        gradient: RawTensor,
        index: usize,
        hook: *mut RawHook,
        out: *mut *mut RawParameter,
    ) -> ErrorText;
    pub(crate) fn phx_parameter_share(parameter: *mut RawParameter) -> *mut RawParameter;
    pub(crate) fn phx_parameter_free(parameter: *mut RawParameter);
    pub(crate) fn phx_is_recording() -> bool;
    pub(crate) fn phx_storage_release(tensor: RawTensor) -> ErrorText;
    pub(crate) fn phx_storage_allocate(tensor: RawTensor) -> ErrorText;
    pub(crate) fn phx_hook_defer(hook: *mut RawHook) -> ErrorText;
    pub(crate) fn phx_hook_take_deferred(
        hook: *mut RawHook,
        out: *mut *mut RawDeferred,
    ) -> ErrorText;
    pub(crate) fn phx_deferred_run(deferred: *mut RawDeferred) -> ErrorText;
    pub(crate) fn phx_deferred_free(deferred: *mut RawDeferred);
    pub(crate) fn phx_project(
        x: RawTensor,
        weight: *mut RawParameter,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_product(
        a: RawTensor,
        weight: *mut RawParameter,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_use_open(parameter: *mut RawParameter, out: *mut *mut RawUse) -> ErrorText;
    pub(crate) fn phx_use_accumulate(r#use: *mut RawUse, dy: RawTensor, x: RawTensor) -> ErrorText;
    pub(crate) fn phx_use_accumulate_scaled(
        r#use: *mut RawUse,
        dy: RawTensor,
        dy_scales: RawTensor,
        x: RawTensor,
        x_scales: RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_scaled_product(
        a: RawTensor,
        a_scales: RawTensor,
        b: RawTensor,
        b_scales: RawTensor,
        fast: bool,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_scaled_is_fast() -> bool;
    pub(crate) fn phx_use_accumulate_rows(
        r#use: *mut RawUse,
        tokens: RawTensor,
        dy: RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_use_done(r#use: *mut RawUse) -> ErrorText;
    pub(crate) fn phx_use_counts(r#use: *mut RawUse) -> bool;
    pub(crate) fn phx_use_free(r#use: *mut RawUse);

    pub(crate) fn phx_linear(
        x: RawTensor,
        weight: *mut RawParameter,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_linear_graph(
        x: RawTensor,
        weight: *mut RawParameter,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_embedding(
        tokens: RawTensor,
        weight: *mut RawParameter,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_rms_norm(
        x: RawTensor,
        weight: *mut RawParameter,
        eps: f64,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_add_rms_norm(
        x: RawTensor,
        residual: RawTensor,
        weight: *mut RawParameter,
        eps: f64,
        normed: *mut RawTensor,
        sum: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_rope_qkv(
        qkv: RawTensor,
        cos: RawTensor,
        sin: RawTensor,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_swiglu(gate_up: RawTensor, out: *mut RawTensor) -> ErrorText;
    pub(crate) fn phx_attention(
        q: RawTensor,
        k: RawTensor,
        v: RawTensor,
        lengths: *const i64,
        counts: *const i64,
        num_rows: usize,
        out: *mut RawTensor,
    ) -> ErrorText;
    pub(crate) fn phx_head_loss(
        x: RawTensor,
        weight: *mut RawParameter,
        targets: RawTensor,
        scale: f64,
        chunk: i64,
        out: *mut RawTensor,
    ) -> ErrorText;
}
