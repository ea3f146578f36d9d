"""The launches of a training step on a GPU: what each moves and multiplies, counted, and the least time that it takes.

``step_plan.py`` plans a step without a GPU, over ``stand_in.py``, a backend that counts. ``triton_counts.py`` and
``conv3x3_counts.py`` count a launch of either kind into ``counts.py``. ``audit.py`` holds the sums against the floor,
``roofline.py`` makes times of them, and ``kernel_times.py`` measures those times. ``../step_model.py`` prints it all.
"""
