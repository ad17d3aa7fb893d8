"""A notebook-first, reproducible companion to CION. `import cion_nb as cion`: the doors of the road, each loaded when it is first used."""
__version__ = "0.2.0"

import lazy_loader as _lazy

# The doors, grouped as the folders are.
_DOORS = {
    "core.settings": ["recipe"],
    "core.runs": ["Run", "list_runs", "over_seeds"],
    "core.samples": ["make_samples", "read_folder", "read_csv", "read_tracklets", "read_samples", "write_samples"],
    "core.store": ["Features", "read_features"],
    "data.datasets": ["read_market1501", "read_msmt17", "read_cion_al", "read_cuhk03np", "read_viper", "read_prcc", "read_ltcc", "read_mars", "read_ilids_vid", "read_prid2011"],
    "data.check": ["check"],
    "data.film": ["make_world", "render", "read_truth", "montage"],
    "data.feature_worlds": ["feature_world"],
    "data.detectors": ["HogDetector", "MotDetections", "OnnxDetector", "TorchvisionDetector"],
    "data.association": ["EmbeddingTracker"],
    "data.tracking": ["cut_tracks", "track", "track_videos"],
    "data.tracking_scores": ["tracking_scores"],
    "data.scenes": ["read_coco", "read_crowdhuman", "read_mot_sequence", "read_cuhk_sysu", "read_prw"],
    "models.architectures": ["InputSpec", "list_backbones"],
    "models.checkpoints": ["load_backbone_weights"],
    "models.backbones": ["create_backbone", "load_backbone", "save_backbone"],
    "models.leaving": ["export_onnx", "export_torchscript"],
    "models.features": ["OnnxModel", "embed", "extract"],
    "identities.neighbours": ["cluster", "jaccard", "knn", "rerank"],
    "identities.noise": ["noise"],
    "identities.truth": ["identity_scores"],
    "identities.calibration": ["calibrate"],
    "identities.denoise": ["Denoised", "denoise"],
    "identities.pseudo_labels": ["pseudo_labels"],
    "identities.explain": ["explain", "explore", "export", "identity_sheet", "suspects"],
    "retrieval.evaluate": ["evaluate", "evaluate_distances", "rank"],
    "retrieval.protocols": ["evaluate_single_shot"],
    "retrieval.gallery": ["Gallery"],
    "retrieval.person_search": ["evaluate_search"],
    "training.pretrain": ["pretrain"],
    "training.finetune": ["finetune"],
    "training.cluster_contrast": ["uda", "usl"],
    "video.clips": ["extract_clips"],
    "video.denseil": ["DenseIL"],
    "video.video_reid": ["video_reid"],
    "video.resampler": ["Resampler"],
    "detection.pointid": ["PointDetector"],
    "detection.find": ["find"],
    "detection.idfree": ["idfree"],
    "detection.embedded": ["EmbeddedDetector"],
    "semantics.local_semantics": ["local_crops", "write_parts"],
    "semantics.vills": ["vills"],
    "companion.score": ["load_model", "score", "score_splits"],
}

_open, __dir__, __all__ = _lazy.attach(__name__, submod_attrs=_DOORS)


def __getattr__(name):
    "A door, when it is first taken; what the comments beside its parameters say becomes part of its help."
    door = _open(name)
    from cion_nb.core.doors import explain_parameters
    return explain_parameters(door)
