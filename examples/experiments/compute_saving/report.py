"""placeholder"""
def report(edition, known, output_dir, say): pass
