// A CUDA driver that only notes how it was called, compiled against NVIDIA's own cuda.h: each function has the exported
// name and the arguments of the real one, or this does not compile. The numbers that Python gives are checked here too.
#include <cuda.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

_Static_assert(CU_MEMHOSTREGISTER_PORTABLE == ZO_PORTABLE, "HOST_REGISTER_PORTABLE");
_Static_assert(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT == ZO_SM_COUNT, "ATTRIBUTE_SM_COUNT");
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == ZO_MAJOR, "ATTRIBUTE_MAJOR");
_Static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == ZO_MINOR, "ATTRIBUTE_MINOR");
_Static_assert(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT == ZO_ENGINES, "ATTRIBUTE_ASYNC_ENGINES");
static const CUresult image_errors[] = {ZO_IMAGE_ERRORS};
_Static_assert(sizeof(image_errors) == 7 * sizeof(CUresult), "ERRORS_OF_IMAGES");

static char text[1 << 16];
static size_t length;
static unsigned char params[4096];
static unsigned params_bytes;
static CUresult answer;  // of the next call that may fail
static __thread CUcontext stack[8];
static __thread int depth;

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  length += vsnprintf(text + length, sizeof text - length, format, arguments);
  va_end(arguments);
}

const char* fake_log(void) { return text; }
void fake_clear(void) { text[length = 0] = 0; }
void fake_answer(int code) { answer = (CUresult)code; }
void fake_params(unsigned bytes) { params_bytes = bytes; }
const unsigned char* fake_last_params(void) { return params; }
// what only the header knows: which of Python's numbers mean an image that cannot be used
int fake_is_image_error(int code) {
  return code == CUDA_ERROR_INVALID_IMAGE || code == CUDA_ERROR_NO_BINARY_FOR_GPU || code == CUDA_ERROR_INVALID_PTX ||
         code == CUDA_ERROR_JIT_COMPILER_NOT_FOUND || code == CUDA_ERROR_UNSUPPORTED_PTX_VERSION ||
         code == CUDA_ERROR_JIT_COMPILATION_DISABLED || code == CUDA_ERROR_INVALID_SOURCE;
}

static CUresult told(void) {
  const CUresult code = answer;
  answer = CUDA_SUCCESS;
  return code;
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char** name) {
  return *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER", CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** name) {
  return *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "other", CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  note("attribute %d of %d\n", (int)attribute, device);
  return *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 9, CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  for (int i = 0; i < 16; ++i) uuid->bytes[i] = (char)(16 * device + i);
  return CUDA_SUCCESS;
}
static int retained;
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return *flags = 0, *active = retained >> device & 1, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  retained |= 1 << device;
  return *context = (CUcontext)(size_t)(0x700000000000 + device), CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) { return stack[++depth] = context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) { return *context = stack[depth--], CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
  note("set current %p\n", (void*)context);
  return stack[depth] = context, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = stack[depth], CUDA_SUCCESS; }
// what needs a context: a thread has none until somebody makes one current
#define NEEDS_CONTEXT \
  if (!stack[depth]) return CUDA_ERROR_INVALID_CONTEXT
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  NEEDS_CONTEXT;
  note("load %.4s\n", (const char*)image);
  return *module = (CUmodule)0x710000000000, told();
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  NEEDS_CONTEXT;
  note("function %s of %p\n", name, (void*)module);
  return *function = (CUfunction)0x720000000000, told();
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
  NEEDS_CONTEXT;
  note("launch %p %u,%u,%u x %u,%u,%u shared %u stream %p extra %p context %p\n", (void*)f, gx, gy, gz, bx, by, bz,
       shared, (void*)stream, (void*)extra, (void*)stack[depth]);
  memcpy(params, parameters[0], params_bytes);
  return told();
}
CUresult cuMemHostRegister(void* address, size_t bytes, unsigned flags) {
  NEEDS_CONTEXT;
  note("register %p %zu flags %u context %p\n", address, bytes, flags, (void*)stack[depth]);
  return told();
}
CUresult cuMemHostUnregister(void* address) {
  NEEDS_CONTEXT;
  note("unregister %p context %p\n", address, (void*)stack[depth]);
  return told();
}
