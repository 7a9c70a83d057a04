"""DESILO FHE 2.0.0 (CPU): a rotation key that one engine has read breaks another engine of the same kind.

    pip install desilofhe==2.0.0; python desilo_keys.py        # closed source, non-commercial licence

Rotates a vector of ones. The engine that read the key gives ones; another one ends the process with a segmentation fault, or gives slots of 1e79
(then heap corruption). Keys that were used by their reader first, that were never serialised, and relinearisation keys are not affected.
"""

import numpy as np
from desilofhe import Engine


def rotated(worker: Engine, rotation_key: object) -> np.ndarray:
    return client.decrypt(client.deserialize_ciphertext(worker.serialize_ciphertext(worker.rotate(worker.deserialize_ciphertext(sent), rotation_key))), secret)


def engine() -> Engine:
    return Engine(max_level=8, mode="parallel", thread_count=1)


client, reader = engine(), engine()
secret = client.create_secret_key()
sent = client.serialize_ciphertext(client.encrypt(np.ones(client.slot_count), client.create_public_key(secret), 6))
data = client.serialize_fixed_rotation_key(client.create_fixed_rotation_key(secret, 1))

print("read and used by one engine:", rotated(reader, reader.deserialize_fixed_rotation_key(data))[:2].real, flush=True)
key = reader.deserialize_fixed_rotation_key(data)
print("read by one, first used by another:", rotated(engine(), key)[:2].real)
