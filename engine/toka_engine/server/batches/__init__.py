"""Files and batches that outlive the process, in the folder that the key `data_dir` names."""
