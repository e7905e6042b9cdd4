// Lets fake tensors on "cuda" live, with gradients, in a build of torch that has no CUDA: a device guard and hooks that
// do nothing. Nothing can be computed there; shapes, dtypes, devices and the graph of autograd are those of a real GPU.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

namespace {

Device the_only_gpu() { return Device(DeviceType::CUDA, 0); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return the_only_gpu(); }
  Device getDevice() const override { return the_only_gpu(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, the_only_gpu()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, the_only_gpu()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, the_only_gpu()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

} // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}
