r"""
Distil a posterior sampler of bedrooms
======================================

As ``train_imagenet.py``, whose options it has, with the DDPM network for LSUN bedrooms and the
degradations and the noise of the paper's experiments with it. It needs diffusers:

.. code-block:: bash

    pip install -e ".[diffusers]"
    python examples/train_lsun.py --train lsun/bedroom --download --bfloat16 --checkpointing
"""

from train_imagenet import main

if __name__ == "__main__":
    main(
        prior="lsun-bedroom256",
        tasks=["inpaint-box", "inpaint-random", "deblur-gaussian", "sr4-bicubic"],
        sigma_y=0.025,
        batch_size=4,
        penalty=0.0025,
    )
