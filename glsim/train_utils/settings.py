"""Every option of the published programs, by its published name, for command lines, YAML files and checkpoints."""

from dataclasses import dataclass, field
from typing import Any, Literal

from common.recipe import TURNS_OFF


def switched_off() -> Any:
    """A field that is on, and that its published flag turns off; `--no-...` says so too."""
    return field(default=True, metadata={TURNS_OFF: True})


@dataclass
class Settings:
    # Configuration files; what the command line says itself wins over them.
    cfg: str | None = None  # YAML file of an experiment
    cfg_method: str | None = None  # YAML file of a method, which wins over --cfg
    # Data
    dataset_name: str = "cub"  # names the data set; some have a rule of their own for transforms
    dataset_root_path: str = "data/CUB_200_2011"  # folder that holds the .csv files
    folder_train: str = "images"  # images of training, below the root
    folder_val: str = "images"  # of validation
    folder_test: str = "images"  # of the test
    df_train: str = "train.csv"  # class_id,dir of each image, in the root
    df_trainval: str = "train_val.csv"  # of training and validation together
    df_val: str = "val.csv"  # of validation
    df_test: str = "test.csv"  # of the test
    df_classid_classname: str = "classid_classname.csv"  # class_id,class_name; numbers serve where it is missing
    train_trainval: bool = switched_off()  # train on train_val and select on test; off: train and val
    # Transforms
    image_size: int = 224  # pixels, square; what the model sees
    resize_size: int | None = None  # pixels; what training crops are cut from; none: 1.34 times the image
    test_resize_size: int | None = None  # pixels; none: as in training
    test_resize_directly: bool = False  # resize test images to the image size, without a crop
    custom_mean_std: bool = False  # normalise by the data set's own mean and deviation, not ImageNet's
    deit_recipe: bool = False  # the transforms of DeiT
    square_resize_random_crop: bool = True  # resize to a square, cut at random
    short_side_resize_random_crop: bool = False  # resize the short side, cut at random
    random_resized_crop: bool = False  # random size and aspect ratio
    square_center_crop: bool = False  # resize to a square, cut in the middle
    affine: bool = False  # random affine transform
    horizontal_flip: bool = False  # mirror every second training image
    vertical_flip: bool = False  # turn every second one upside down
    aa: bool = False  # AutoAugment
    randaug: bool = False  # RandAugment
    trivial_aug: bool = False  # TrivialAugmentWide
    jitter_prob: float = 0.0  # probability of colour jitter
    jitter_bcs: float = 0.4  # its brightness, contrast and saturation
    jitter_hue: float = 0.1  # its hue
    blur: float = 0.0  # probability of a Gaussian blur
    greyscale: float = 0.0  # probability of grey
    solarize_prob: float = 0.0  # probability of solarisation
    solarize: int = 128  # grey level from which colours are inverted
    re: float = 0.0  # probability of random erasing
    re_sh: float = 0.4  # largest share of the image erased
    re_r1: float = 0.3  # smallest aspect ratio erased
    ra: int = 0  # times an image is repeated, differently augmented, among the images of an epoch; 0: once
    # Mixing and loss
    cm: bool = False  # CutMix
    beta: float = 1.0  # its Beta distribution
    mu: bool = False  # MixUp
    alpha: float = 1.0  # its Beta distribution
    mix_prob: float = 0.5  # probability that a batch is mixed
    ls: bool = False  # label smoothing
    smoothing: float = 0.1  # how much
    focal_gamma: float = 0.0  # focal loss with this exponent; 0: cross-entropy
    focal_alpha: float = 0.25  # weight of the focal loss
    # Model
    model_name: str = "vit_b16"  # vit_*, glsvit_*, glsdeit*, transfg, ffvt, cal, resnet50, resnet101, or timm's name
    pretrained: bool = False  # start from ImageNet weights: Google's .npz for vit_*, transfg and ffvt
    weights_dir: str = "ckpts"  # where these .npz files are, and where missing ones are downloaded to
    ckpt_path: str | None = None  # a checkpoint: ours or the authors'
    transfer_learning: bool = False  # train from it, without --cfg too
    classifier: Literal["cls", "avg_cls", "max_cls", "pool", "cls_pool"] = "cls"  # what the head reads
    dynamic_anchor: bool = False  # GLSim: crop, and encode the crop too
    dynamic_top: int = 8  # patches that the crop is drawn around (the paper's O); twice as many on dogs
    sim_metric: Literal["cos", "l1", "l2"] = "cos"  # similarity of CLS and patches
    anchor_random: bool = False  # patches at random instead
    anchor_class_token: bool = False  # a CLS token of the crop's own, which vit_* have and do not read
    crop_inclusive: bool = False  # do not cut off the last selected row and column
    inference_crops: bool = switched_off()  # crops in evaluation too (glsvit_*, glsdeit*)
    select_top_k: bool = False  # no crop: the selected tokens themselves are aggregated (glsvit_*, glsdeit*)
    encoder_norm: bool = switched_off()  # LayerNorm behind the encoder
    reducer: Literal["cls"] | None = None  # cls: only CLS tokens go on to the aggregator
    aggregator: bool = False  # blocks that see image and crop together
    aggregator_num_hidden_layers: int | None = None  # how many; none: 1
    aggregator_norm: bool = False  # LayerNorm behind them
    aggregator_type: Literal["transformer", "dwsc", "conv"] = "transformer"  # what they are (glsvit_*, glsdeit*)
    token_drop: float = 0.0  # share of the patches dropped in training (glsvit_*, glsdeit*)
    freeze_backbone: bool = False  # train only what is behind the encoder, and adapters
    adapter: Literal["bottleneck"] | None = None  # adapters in the encoder, trained alone (glsvit_*, glsdeit*)
    cal_single_crop: bool = False  # test cal on the image alone
    hidden_size: int | None = None  # none, here and below: of the named model (vit_*)
    intermediate_size: int | None = None  # width of its MLPs
    num_attention_heads: int | None = None  # in a block
    num_hidden_layers: int | None = None  # blocks
    representation_size: int | None = None  # width behind the encoder
    attention_probs_dropout_prob: float | None = None  # dropout of attention weights
    hidden_dropout_prob: float | None = None  # dropout at the end of each residual branch
    layer_norm_eps: float | None = None  # added to the variance in each LayerNorm
    sd: float = 0.0  # stochastic depth (vit_*, glsvit_*, glsdeit*, timm's)
    test_flip: bool = False  # evaluate on the image and its mirror image
    debugging: bool = False  # print the shape at each stage
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the model
