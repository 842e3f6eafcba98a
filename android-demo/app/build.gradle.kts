plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "io.edgekd.demo"
    compileSdk = 36
    defaultConfig {
        applicationId = "io.edgekd.demo"
        minSdk = 26
        targetSdk = 36
        versionCode = 1
        versionName = "0.1"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }
    flavorDimensions += "runtime"
    productFlavors {
        create("gguf") { dimension = "runtime" }
        create("executorch") {
            dimension = "runtime"
            applicationIdSuffix = ".executorch"
        }
    }
    // Written by tools/native.sh, which needs no NDK.
    sourceSets.getByName("gguf").jniLibs.srcDir("../build/jniLibs")
    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles(getDefaultProguardFile("proguard-android-optimize.txt"), "rules.pro")
        }
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    kotlin { compilerOptions { jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_1_8) } }
}

dependencies {
    implementation(project(":core"))
    "executorchImplementation"("org.pytorch:executorch-android:1.5.1")
}
