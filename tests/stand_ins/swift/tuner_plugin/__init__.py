"""Stands in for swift.tuner_plugin: what our tuner uses of it."""

from peft import PeftModel


class PeftTuner:
    @staticmethod
    def prepare_model(args, model):
        raise NotImplementedError

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


tuners_map = {}
