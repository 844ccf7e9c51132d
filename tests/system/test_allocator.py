import subprocess
import sys

from immich_ml_metal.system.allocator import release_free_memory

GROW = """
import threading, psutil
from immich_ml_metal.system.allocator import limit_arenas, release_free_memory

limit_arenas()
kept = []
def fill():
    blocks = [bytearray(60_000) for _ in range(2000)]
    kept.append(bytearray(60_000))  # pins the top of the heap, so that nothing is trimmed by itself
    del blocks
thread = threading.Thread(target=fill)
thread.start()
thread.join()
before = psutil.Process().memory_info().rss
release_free_memory()
print(before - psutil.Process().memory_info().rss)
"""


def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    assert int(done.stdout) > (50_000_000 if sys.platform == "linux" else -1)


def test_releasing_twice_does_no_harm() -> None:
    release_free_memory()
    release_free_memory()
