"""One case for each path through the Triton kernels, where the whole list would take too long. Imports nothing."""

PATHS = frozenset((
    *("only_add", "only_mul", "only_cat", "only_awf", "only_sub", "only_avg", "only_max", "only_bounded_mul"),
    *("kept_one_awf", "classes_6", "classes_17", "line", "volume_thin", "volume_bfloat16", "empty_batch"),
    *("labels_uint8", "ignore_255", "weight_map_half", "weights_classes_17", "label_smoothing_ignore"),
    *("soft_classes_17", "sigmoid_bool", "sigmoid_one_class_ignore", "sigmoid_classes_17"),
))  # fmt: skip
