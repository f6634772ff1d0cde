"""Every option of the published programs, by its published name, for command lines, YAML files and checkpoints."""

from dataclasses import dataclass, field
from typing import Any, Literal

from common.cli import TURNS_OFF


def switched_off() -> Any:
    """A field that is on, and that its published flag turns off; `--no-...` says so too."""
    return field(default=True, metadata={TURNS_OFF: True})


@dataclass
class Settings:
    # Configuration files; what the command line says itself wins over them.
    cfg: str | None = None  # YAML file of an experiment
    cfg_method: str | None = None  # YAML file of a method, which wins over --cfg
    # Data
    dataset_name: str = "cub"  # the data set's name; some data sets have transforms of their own
    dataset_root_path: str = "data/CUB_200_2011"  # folder that holds the .csv files
    folder_train: str = "images"  # training images, below the root
    folder_val: str = "images"  # validation images
    folder_test: str = "images"  # test images
    df_train: str = "train.csv"  # training list in the root: class_id,dir of each image
    df_trainval: str = "train_val.csv"  # list of training and validation together
    df_val: str = "val.csv"  # validation list
    df_test: str = "test.csv"  # test list
    df_classid_classname: str = "classid_classname.csv"  # class_id,class_name; without it classes are numbered
    train_trainval: bool = switched_off()  # train on train_val, select on test; off: train on train, select on val
    # Transforms
    image_size: int = 224  # pixels, square; the model's input
    resize_size: int | None = None  # pixels before the training crop; none: 1.34 times --image_size
    test_resize_size: int | None = None  # pixels before the test crop; none: as in training
    test_resize_directly: bool = False  # resize test images to --image_size, without a crop
    custom_mean_std: bool = False  # normalise by the data set's mean and standard deviation, not ImageNet's
    deit_recipe: bool = False  # the transforms of DeiT
    square_resize_random_crop: bool = True  # training: resize to a square, random crop
    short_side_resize_random_crop: bool = False  # training: resize the short side, random crop
    random_resized_crop: bool = False  # training: crop of random size and aspect ratio
    square_center_crop: bool = False  # training: resize to a square, centre crop
    affine: bool = False  # random affine transform
    horizontal_flip: bool = False  # mirror training images with probability 0.5
    vertical_flip: bool = False  # turn them upside down with probability 0.5
    aa: bool = False  # AutoAugment
    randaug: bool = False  # RandAugment
    trivial_aug: bool = False  # TrivialAugmentWide
    jitter_prob: float = 0.0  # probability of colour jitter
    jitter_bcs: float = 0.4  # brightness, contrast and saturation of the jitter
    jitter_hue: float = 0.1  # hue of the jitter
    blur: float = 0.0  # probability of a Gaussian blur
    greyscale: float = 0.0  # probability of greyscale
    solarize_prob: float = 0.0  # probability of solarisation
    solarize: int = 128  # grey level from which colours are inverted
    re: float = 0.0  # probability of random erasing
    re_sh: float = 0.4  # largest share of the image that --re erases
    re_r1: float = 0.3  # smallest aspect ratio of the erased rectangle
    ra: int = 0  # repeated augmentation: how often an image occurs in a row; 0: once
    # Mixing and loss
    cm: bool = False  # CutMix
    beta: float = 1.0  # parameter of CutMix's Beta distribution
    mu: bool = False  # MixUp
    alpha: float = 1.0  # parameter of MixUp's Beta distribution
    mix_prob: float = 0.5  # probability that a batch is mixed
    ls: bool = False  # label smoothing
    smoothing: float = 0.1  # strength of label smoothing
    focal_gamma: float = 0.0  # focal loss with this exponent; 0: cross-entropy
    focal_alpha: float = 0.25  # weight of the focal loss
    # Model
    model_name: str = "vit_b16"  # vit_*, glsvit_*, glsdeit*, transfg, ffvt, cal, gft, resnet50, resnet101, or timm's
    pretrained: bool = False  # start from ImageNet weights: Google's .npz for vit_*, transfg and ffvt
    weights_dir: str = "ckpts"  # where these .npz files are, and where missing ones are downloaded to
    ckpt_path: str | None = None  # a checkpoint: ours or the authors'
    transfer_learning: bool = False  # train from --ckpt_path, also without --cfg
    classifier: Literal["cls", "avg_cls", "max_cls", "pool", "cls_pool"] = "cls"  # what the head reads
    dynamic_anchor: bool = False  # GLSim: crop, and encode the crop too
    dynamic_top: int = 8  # patches that the crop is drawn around (the paper's O); twice as many on dogs
    sim_metric: Literal["cos", "l1", "l2"] = "cos"  # similarity of CLS and patches
    anchor_random: bool = False  # choose these patches at random
    anchor_class_token: bool = False  # a CLS token for the crop; vit_* have it and do not read it
    crop_inclusive: bool = False  # the crop includes the last selected row and column
    inference_crops: bool = switched_off()  # crops in evaluation too (glsvit_*, glsdeit*)
    select_top_k: bool = False  # no crop: the selected tokens themselves are aggregated (glsvit_*, glsdeit*)
    encoder_norm: bool = switched_off()  # LayerNorm after the encoder
    reducer: Literal["cls"] | None = None  # cls: only CLS tokens go on to the aggregator
    aggregator: bool = False  # blocks over the tokens of image and crop together
    aggregator_num_hidden_layers: int | None = None  # number of these blocks; none: 1
    aggregator_norm: bool = False  # LayerNorm after these blocks
    aggregator_type: Literal["transformer", "dwsc", "conv"] = "transformer"  # kind of these blocks (glsvit_*, glsdeit*)
    token_drop: float = 0.0  # share of the patches dropped in training (glsvit_*, glsdeit*)
    freeze_backbone: bool = False  # train only what comes after the encoder, and adapters
    adapter: Literal["bottleneck"] | None = None  # adapters, trained instead of the encoder (glsvit_*, glsdeit*)
    cal_single_crop: bool = False  # cal: no attention crops in the test
    hidden_size: int | None = None  # width of the encoder (vit_*); none, here and below: as --model_name says
    intermediate_size: int | None = None  # width of the MLPs
    num_attention_heads: int | None = None  # heads of a block
    num_hidden_layers: int | None = None  # number of blocks
    representation_size: int | None = None  # width of the tokens after the encoder
    attention_probs_dropout_prob: float | None = None  # dropout of attention weights
    hidden_dropout_prob: float | None = None  # dropout at the end of each residual branch
    layer_norm_eps: float | None = None  # added to the variance in each LayerNorm
    sd: float = 0.0  # stochastic depth (vit_*, glsvit_*, glsdeit*, gft, timm's)
    test_flip: bool = False  # evaluate on the image and its mirror image
    debugging: bool = False  # print the shape at each stage
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the model
