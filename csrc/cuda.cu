// The CUDA kernels as one file to compile: `nvcc -fatbin csrc/cuda.cu` (setup.py), or the same text through NVRTC.
//
// There is no host code: the image is loaded and launched through the driver (zo_offload/numerics/cuda_kernels.py), in torch's
// own context. So nothing here links a CUDA runtime that could refuse the driver, and the library, nvcc's image and
// NVRTC's take one and the same way to the GPU.
#include "cuda_kernels.h"
