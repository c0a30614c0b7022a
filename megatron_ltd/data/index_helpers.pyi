from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION: int

def mapping_uint32(documents: NDArray[np.int64], lengths: NDArray[np.int32], samples: int, longest: int,
                   short_ratio: int, seed: int, least_sentences: int, longest_sentence: int) -> NDArray[Any]: ...

def mapping_uint64(documents: NDArray[np.int64], lengths: NDArray[np.int32], samples: int, longest: int,
                   short_ratio: int, seed: int, least_sentences: int, longest_sentence: int) -> NDArray[Any]: ...

def blend(shares: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...

def shuffle(values: NDArray[np.int32], key: NDArray[np.uint32], position: int) -> int: ...
