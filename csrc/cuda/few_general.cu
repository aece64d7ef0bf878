// The kernels of general calls for one number of classes: what few.cu has, with any target, weights and operator. In a
// file of their own, so that both compile at the same time.
#include "few_launch.cuh"

namespace lomix::cuda {

template cudaError_t launch_statistics_few<LOMIX_CLASSES, true>(const Call<float>&, Memory, cudaStream_t);
template cudaError_t launch_gradients_few<LOMIX_CLASSES, true>(const Call<float>&, Memory, cudaStream_t);

}  // namespace lomix::cuda
