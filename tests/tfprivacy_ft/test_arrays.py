import numpy as np

from tfprivacy_ft import arrays


def test_memory_is_used_again_only_once_nobody_holds_an_array_in_it():
    memory, shape = arrays.Memory(), (1000, 500)
    first = memory.array(np.dtype(np.float32), shape)
    first[:] = 1.0
    part, place = first[3:7, 2], first.ctypes.data
    del first
    second = memory.array(np.dtype(np.float32), shape)
    second[:] = 2.0
    assert second.ctypes.data != place and (part == 1.0).all()
    del part
    assert memory.array(np.dtype(np.float32), (1010, 500)).ctypes.data == place
    assert memory.array(np.dtype(np.float32), (1200, 500)).ctypes.data != place  # it has become too small
