/* Counts the allocations of a process between two points; preloaded by test_native_steady_state.py.
 * Every thread's count; operator new comes through malloc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_long count;

void *malloc(size_t size) {
  atomic_fetch_add(&count, 1);
  return __libc_malloc(size);
}
void *calloc(size_t number, size_t size) {
  atomic_fetch_add(&count, 1);
  return __libc_calloc(number, size);
}
void *realloc(void *old, size_t size) {
  atomic_fetch_add(&count, 1);
  return __libc_realloc(old, size);
}
void *aligned_alloc(size_t alignment, size_t size) {
  atomic_fetch_add(&count, 1);
  return __libc_memalign(alignment, size);
}

typedef int32_t (*step_function)(void *engine, const void *batch, void *result, void *message);

/* Allocations of `times` steps, or -1 if one of them fails. */
long count_allocations(step_function step, void *engine, const void *batch, void *result,
                       void *message, int times) {
  const long before = atomic_load(&count);
  for (int i = 0; i < times; ++i) {
    if (step(engine, batch, result, message) != 0) return -1;
  }
  return atomic_load(&count) - before;
}
