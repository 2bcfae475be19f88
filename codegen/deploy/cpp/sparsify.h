/* Run models that sparsify_compiler exported (CompiledModel.export), from C or C++, without Python and without PyTorch.
 *
 *     sparsify_model* model = sparsify_load("folder", NULL);
 *     if (!model) { fprintf(stderr, "%s\n", sparsify_last_error()); return 1; }
 *     sparsify_tensor ids = {data, SPARSIFY_INT64, 2, {1, 64}}, out[2];
 *     const char* names[] = {"input_ids", "attention_mask"};
 *     if (sparsify_run(model, "main", names, inputs, 2, out, 2)) ...
 *     sparsify_release(out, 2); sparsify_free(model);
 *
 * Loading checks that every file is undamaged, and that this machine has the architecture and the instructions that the code was compiled for, before
 * any of it runs. Weights are mapped from their file, not read. Needs libtvm_ffi.so (linked) and libtvm_runtime.so (found at load).
 *
 * Threads: as many as the processors that the process may use, at most as many as the model was compiled for; TVM_NUM_THREADS or
 * sparsify_options.threads sets another number, before the first load of a process. They sleep where they wait and stay on no processor, so that a
 * program beside costs a call no more than its share; on a machine without any, TVM_THREAD_POOL_SPIN_COUNT=300000 makes short calls quicker. A model
 * may be run by one thread at a time.
 */
#ifndef SPARSIFY_H_
#define SPARSIFY_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPARSIFY_DIMENSIONS 8

typedef enum {
  SPARSIFY_FLOAT32 = 0, SPARSIFY_FLOAT64, SPARSIFY_FLOAT16, SPARSIFY_BFLOAT16, SPARSIFY_INT64, SPARSIFY_INT32, SPARSIFY_INT16, SPARSIFY_INT8,
  SPARSIFY_UINT8, SPARSIFY_BOOL
} sparsify_dtype;

/* A tensor on the CPU, contiguous, its last dimension first in memory. `owner` is the library's, for outputs: leave it 0 in inputs. */
typedef struct {
  void* data;
  int32_t dtype; /* sparsify_dtype */
  int32_t dimensions;
  int64_t shape[SPARSIFY_DIMENSIONS]; /* of a model's inputs and outputs: -1 where it varies */
  void* owner;
} sparsify_tensor;

typedef struct {
  int32_t threads;      /* 0: see above */
  int32_t skip_hashes;  /* 1: do not compare files with their hashes (0.3 s for 100 MB) */
  const char* runtime;  /* path of libtvm_runtime.so; NULL: beside the folder's files, else where the system looks */
} sparsify_options;

typedef struct sparsify_model sparsify_model;

/* The model in a folder, or NULL: see sparsify_last_error. `options` may be NULL. */
sparsify_model* sparsify_load(const char* folder, const sparsify_options* options);
void sparsify_free(sparsify_model* model);

/* What was wrong in the last call of this thread that failed, in a sentence. Valid until its next call. */
const char* sparsify_last_error(void);

/* Functions of the model, and what they take and return, by number; NULL, or a negative number, where there is no such thing. */
const char* sparsify_function(const sparsify_model* model, int number);
int sparsify_inputs(const sparsify_model* model, const char* function);
int sparsify_outputs(const sparsify_model* model, const char* function);
const char* sparsify_input(const sparsify_model* model, const char* function, int number, sparsify_tensor* what);
const char* sparsify_output(const sparsify_model* model, const char* function, int number, sparsify_tensor* what);
/* The name of a dimension that varies ("batch"), NULL for one that does not. */
const char* sparsify_symbol(const sparsify_model* model, const char* function, int input, int dimension);

/* Run a function on inputs, in any order, told by their names. Outputs come in the function's own order, to be given to sparsify_release.
 * Inputs that start at a multiple of 64 bytes are read where they lie; others are copied first, but for caches, which functions change in place and
 * which are refused. Returns 0, or -1: see sparsify_last_error. */
int sparsify_run(sparsify_model* model, const char* function, const char* const* names, const sparsify_tensor* inputs, int input_count,
                 sparsify_tensor* outputs, int output_count);
void sparsify_release(sparsify_tensor* outputs, int count);

#ifdef __cplusplus
}
#endif
#endif
