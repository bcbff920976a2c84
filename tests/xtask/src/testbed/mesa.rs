//! A stock Mesa: the files of Debian's packages that programs need to draw by EGL, GBM and OpenGL ES on virtio_gpu, and
//! packaged programs that do so. LLVM alone makes them 200 MB, so no initramfs has them: they are the archive `mesa.cpio`
//! in the folder that is `/boot` in L1, where tests unpack it, and give it to a guest beside its own initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::{Archive, mode, shared_libraries};
use super::{Error, file_error, progress};
use crate::command;
use crate::packages;

/// The packages whose files are in the archive.
const PACKAGES: &[&str] = &[
    "libegl1",       // EGL ...
    "libegl-mesa0",  // ... by Mesa
    "libgbm1",       // buffers without a window
    "libgles2",      // OpenGL ES, for programs that are linked to it
    "libgl1",        // OpenGL, to which piglit is linked
    "libwaffle-1-0", // how piglit comes to a context
    "libgl1-mesa-dri",
    "libdrm-tests",   // drmdevice
    "mesa-utils-bin", // eglinfo
];

/// Packaged programs: their path in the archive, and the file here.
const PROGRAMS: &[(&str, &str)] = &[
    ("bin/drmdevice", "/usr/bin/drmdevice"),
    ("bin/eglinfo", "/usr/bin/eglinfo.x86_64-linux-gnu"),
];

/// Where Debian has libraries.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// Libraries that programs or other libraries load by name.
const LOADED: &[&str] = &[
    "libEGL.so.1",
    "libEGL_mesa.so.0",
    "libGLESv2.so.2",
    "libgbm.so.1",
    // All of Debian's drivers are one file; this is its name for virtio_gpu.
    "dri/virtio_gpu_dri.so",
];

/// What they read: EGL's list of vendors, and Mesa's list of programs that need workarounds.
const DATA: &[&str] = &[
    "/usr/share/glvnd/egl_vendor.d/50_mesa.json",
    "/usr/share/drirc.d/00-mesa-defaults.conf",
];

/// The package of tests that decide by themselves whether a picture is right. It takes 2 GB when installed, so only
/// these files are taken out of it.
const PIGLIT: &str = "piglit";

/// Where the package has the files of [`PIGLIT_FILES`]; `/piglit` is where the archive has them.
const PIGLIT_FOLDER: &str = "usr/lib/x86_64-linux-gnu/piglit";

/// Programs, libraries and test descriptions of piglit.
const PIGLIT_FILES: &[&str] = &[
    "bin/shader_runner_gles3",
    "bin/egl_mesa_platform_surfaceless",
    "bin/ext_color_buffer_float-draw_gles3",
    "bin/fragdepth_gles2",
    "bin/glsl-fs-pointcoord_gles2",
    "bin/oes_packed_depth_stencil-depth-stencil-texture_gles2",
    "bin/varying-struct-centroid_gles3",
    "lib/libpiglitutil.so.0",
    "lib/libpiglitutil_gles2.so.0",
    "lib/libpiglitutil_gles3.so.0",
    "tests/spec/glsl-es-3.00/execution/varying-struct-interpolation.shader_test",
    "generated_tests/spec/glsl-es-3.00/execution/built-in-functions/fs-packHalf2x16.shader_test",
    "generated_tests/spec/glsl-es-3.00/execution/built-in-functions/vs-unpackSnorm2x16.shader_test",
];

/// Writes the archive to `image` unless it is made of the same files already. What is downloaded stays in `cache`.
pub fn write(image: &Path, cache: &Path) -> Result<(), Error> {
    packages::install_missing(PACKAGES)?;
    let piglit = piglit(cache)?;
    let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut programs: Vec<(String, PathBuf)> = PROGRAMS
        .iter()
        .map(|(path, here)| ((*path).to_owned(), PathBuf::from(here)))
        .collect();
    programs.extend(LOADED.iter().map(|library| {
        let here = Path::new(LIBRARIES).join(library);
        (relative(&here), here)
    }));
    programs.extend(
        PIGLIT_FILES
            .iter()
            .map(|file| (format!("piglit/{file}"), piglit.join(file))),
    );
    for (path, here) in programs {
        for library in shared_libraries(&here) {
            files.insert(relative(&library), library);
        }
        files.insert(path, here);
    }
    files.extend(
        DATA.iter()
            .map(|file| (relative(Path::new(file)), file.into())),
    );

    let mut list = String::new();
    for (path, here) in &files {
        let metadata = fs::metadata(here).map_err(file_error("read", here))?;
        let (size, time) = (metadata.size(), metadata.mtime());
        list += &format!("{path} {} {size} {time}\n", here.display());
    }
    let list_path = cache.join("mesa.list");
    if image.exists() && fs::read_to_string(&list_path).is_ok_and(|old| old == list) {
        return Ok(());
    }
    progress(format_args!("packing a stock Mesa"));
    let mut archive = Archive::new();
    for (path, here) in &files {
        archive.file(path, mode::PROGRAM, here)?;
    }
    archive.write(image)?;
    fs::write(&list_path, list).map_err(file_error("write", &list_path))
}

/// A path without its first `/`, as archives have it.
fn relative(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// The folder in `cache` that has [`PIGLIT_FILES`].
fn piglit(cache: &Path) -> Result<PathBuf, Error> {
    let version = packages::candidate(PIGLIT)?;
    let folder = cache.join(format!("{PIGLIT}_{version}"));
    if !PIGLIT_FILES.iter().all(|file| folder.join(file).exists()) {
        progress(format_args!(
            "downloading {PIGLIT} {version} (once, 34 MB) and unpacking a few of its files"
        ));
        // A folder of the final name is complete: it is made under another name first.
        let partial = cache.join("piglit.partial");
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).map_err(file_error("create", &partial))?;
        let package = packages::download(PIGLIT, &version, &partial)?;
        command::capture(
            Command::new("sh")
                .arg("-c")
                .arg("dpkg-deb --fsys-tarfile \"$0\" | tar --extract --occurrence --directory \"$@\"")
                .arg(&package)
                .arg(&partial)
                .arg(format!("--strip-components={}", PIGLIT_FOLDER.split('/').count() + 1))
                .args(PIGLIT_FILES.iter().map(|file| format!("./{PIGLIT_FOLDER}/{file}"))),
        )?;
        fs::remove_file(&package).map_err(file_error("remove", &package))?;
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&partial, &folder).map_err(file_error("create", &folder))?;
    }
    Ok(folder)
}
