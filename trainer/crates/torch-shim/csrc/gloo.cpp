// Gloo out of libtorch: a store that calls into Rust, and point-to-point messages between the ranks of a group.
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "closure.h"

using at::Tensor;
using phalanx::guarded;
using phalanx::raise_if;
using Milliseconds = std::chrono::milliseconds;

extern "C" {
// The answers of a store in Rust. Values are pushed into `sink`, so that no memory changes owner.
typedef void (*phx_push)(void* sink, const uint8_t* data, size_t length);
struct phx_store_calls {
  char* (*set)(void* context, const char* key, const uint8_t* data, size_t length);
  char* (*get)(void* context, const char* key, int64_t timeout_ms, void* sink, phx_push push);
  char* (*add)(void* context, const char* key, int64_t delta, int64_t* out);
  char* (*wait)(void* context, const char* const* keys, size_t count, int64_t timeout_ms);
  char* (*check)(void* context, const char* const* keys, size_t count, bool* out);
  char* (*remove)(void* context, const char* key, bool* out);
  phx_drop drop;
};
}

namespace {

std::vector<const char*> pointers(const std::vector<std::string>& keys) {
  std::vector<const char*> list;
  for (auto& key : keys) list.push_back(key.c_str());
  return list;
}

struct RustStore : c10d::Store {
  void* context;
  phx_store_calls calls;
  RustStore(void* context, phx_store_calls calls, Milliseconds timeout)
      : c10d::Store(timeout), context(context), calls(calls) {}
  ~RustStore() override { calls.drop(context); }

  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::intrusive_ptr<c10d::Store>::reclaim_copy(this);
  }
  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    raise_if(calls.set(context, key.c_str(), value.data(), value.size()));
  }
  std::vector<uint8_t> get(const std::string& key) override {
    std::vector<uint8_t> value;
    auto push = [](void* sink, const uint8_t* data, size_t length) {
      static_cast<std::vector<uint8_t>*>(sink)->assign(data, data + length);
    };
    raise_if(calls.get(context, key.c_str(), timeout_.count(), &value, push));
    return value;
  }
  int64_t add(const std::string& key, int64_t delta) override {
    int64_t out = 0;
    raise_if(calls.add(context, key.c_str(), delta, &out));
    return out;
  }
  bool deleteKey(const std::string& key) override {
    bool out = false;
    raise_if(calls.remove(context, key.c_str(), &out));
    return out;
  }
  bool check(const std::vector<std::string>& keys) override {
    bool out = false;
    auto list = pointers(keys);
    raise_if(calls.check(context, list.data(), list.size(), &out));
    return out;
  }
  int64_t getNumKeys() override { return 0; }
  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }
  void wait(const std::vector<std::string>& keys, const Milliseconds& timeout) override {
    auto list = pointers(keys);
    raise_if(calls.wait(context, list.data(), list.size(), timeout.count()));
  }
};

struct Message {
  c10::intrusive_ptr<c10d::Work> work;
  std::vector<Tensor> tensors;  // kept alive until the message is through
};

}  // namespace

extern "C" {

struct phx_gloo {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
};

// Takes the context over whatever happens.
char* phx_gloo_new(void* context, const phx_store_calls* calls, int rank, int size, int64_t timeout_ms,
                   const char* hostname, phx_gloo** out) {
  return guarded([&] {
    auto store = c10::make_intrusive<RustStore>(context, *calls, Milliseconds(timeout_ms));
    auto options = c10d::ProcessGroupGloo::Options::create(Milliseconds(timeout_ms));
    options->threads = 1;
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(hostname));
    *out = new phx_gloo{c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options)};
  });
}

void phx_gloo_free(phx_gloo* gloo) {
  free(guarded([&] { delete gloo; }));
}

char* phx_gloo_send(phx_gloo* gloo, Tensor* tensor, int peer, int tag, Message** out) {
  return guarded([&] {
    auto message = std::make_unique<Message>();
    message->tensors = {*tensor};
    message->work = gloo->group->send(message->tensors, peer, tag);
    *out = message.release();
  });
}

char* phx_gloo_recv(phx_gloo* gloo, Tensor* tensor, int peer, int tag, Message** out) {
  return guarded([&] {
    auto message = std::make_unique<Message>();
    message->tensors = {*tensor};
    message->work = gloo->group->recv(message->tensors, peer, tag);
    *out = message.release();
  });
}

char* phx_message_wait(Message* message, int64_t timeout_ms) {
  return guarded([&] { TORCH_CHECK(message->work->wait(Milliseconds(timeout_ms)), "the wait was aborted"); });
}

char* phx_message_abort(Message* message) {
  return guarded([&] { message->work->abort(); });
}

void phx_message_free(Message* message) {
  free(guarded([&] { delete message; }));
}

}  // extern "C"
