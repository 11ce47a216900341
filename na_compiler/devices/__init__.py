"""What kernels run on: a file a device. One that is not imported here has no kernels, and is refused by its name."""

from na_compiler.devices.cpu import CPU
from na_compiler.devices.cuda import CUDA
from na_compiler.devices.device import DEVICES

__all__ = ["CPU", "CUDA", "DEVICES"]
