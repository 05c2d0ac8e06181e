// Uninitialised scratch memory, aligned to a cache line, that only grows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "aligned.h"

namespace swat::cpu {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }

  T* data() { return data_.get(); }
  int64_t capacity() const { return capacity_; }

  // Room for `count` elements; what was there is lost when it has to grow.
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    data_.reset();
    capacity_ = 0;
    data_.reset(static_cast<T*>(allocate_aligned(count * sizeof(T))));
    if (!data_) throw std::bad_alloc();
    capacity_ = count;
  }

 private:
  struct Free {
    void operator()(T* p) const { free_aligned(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

// A buffer that keeps its contents while it grows, for output whose size is not known beforehand. Growing a large one moves pages,
// not bytes, where the C library can.
template <typename T>
class GrowingBuffer {
 public:
  GrowingBuffer() = default;
  GrowingBuffer(const GrowingBuffer&) = delete;
  GrowingBuffer& operator=(const GrowingBuffer&) = delete;
  ~GrowingBuffer() { std::free(data_); }

  T* data() { return data_; }

  void reserve(int64_t count) {
    if (count <= capacity_) return;
    if (count < 2 * capacity_) count = 2 * capacity_;
    void* grown = std::realloc(data_, count * sizeof(T));
    if (grown == nullptr) throw std::bad_alloc();
    data_ = static_cast<T*>(grown);
    capacity_ = count;
  }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace swat::cpu
