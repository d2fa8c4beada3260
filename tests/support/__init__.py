"""What tests share: tiny models (`zoo`), training and comparing, and stand-ins for what a machine may not have.

zoo               tiny models of many architectures, and inputs for them
texts             a tiny language model whose tokenizer knows every byte
training          a method, batches, a run of a few steps; what it gives
codes             stored bytes of any format, drawn where nothing is encoded
compare           bit-equality, the one way to compare tensors and losses
block_files       block files without a run: shapes, contents, and a tier that holds version 0
planning          what `zo-offload plan` tells, without the command line around it
plain_mezo        MeZO in a few lines, in memory: what the engine must equal
ranks             several processes that train one run together
pool              a keeper and its members: processes that tell how far they are, and are killed and stopped
quantized_models   writers of quantized checkpoints, from the published layouts
record_quantized   makes data/quantized.safetensors of what the libraries write
lanes             a source of weights from a dict, and what lanes must equal
native_variants   a test under the reference and every instruction set of the native library
fake_cuda         streams that run late and in any allowed order, with a race checker
on_device         every engine of a test on such a device
fake_gpu          memory that is not the host's
cuda_simulated    the CUDA kernels on this CPU; ptx_to_c.py translates what the compiler made of them
*.c               compiled by the tests that need them

Test files import from here and never from each other; fixtures that several need are in conftest.py.
"""
